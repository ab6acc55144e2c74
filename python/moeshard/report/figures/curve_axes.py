"""The curve of loss by experts kept, drawn."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeshard.evaluation.curve import RULE, Curve, Point
from moeshard.report.drawing import COLOURS, FAINT, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 4.4
"""Inches."""
_RATIOS = (1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
_MARKERS = "osD^vPX*"


def draw_curve(canvas: Figure, curve: Curve) -> None:
    """Draw on an empty canvas: excess of loss (left) and ratio of perplexities (right) by experts kept per layer.

    The scale above counts experts in multiples of what a token uses; the multiples of the rule of thumb are shaded. A
    lone strategy is drawn with a faint line for each domain.
    """
    axes = canvas.add_subplot()
    used = curve.n_expert_used
    alone = len(curve.strategies) == 1 and len(curve.domains) > 1
    axes.set_xscale("log", base=2)
    axes.axvspan(RULE[0] * used, RULE[1] * used, color=FAINT, alpha=0.16, linewidth=0, zorder=0)
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
    top = 0.0
    for index, (name, points) in enumerate(curve.strategies.items()):
        keep = [point.keep for point in points]
        excess = np.array([point.scores.excess for point in points])
        low, high = np.array([point.scores.excess_ci for point in points]).T
        colour = COLOURS[index % len(COLOURS)]
        if alone:
            for domain in curve.domains:
                own = [point.scores.domains[domain].excess for point in points]
                top = max(top, *own)
                axes.plot(keep, own, color=FAINT, alpha=0.55, linewidth=0.9, zorder=2)
        top = max(top, high.max())
        # An interval by percentiles need not hold the mean, where it is as narrow as rounding.
        spread = np.maximum([excess - low, high - excess], 0)
        axes.errorbar(
            keep,
            excess,
            yerr=spread,
            color=colour,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=3,
            label=name if not alone else f"{name}, mean over {len(curve.domains)} domains",
            zorder=3,
        )
    _scales(axes, curve, top)
    if alone:
        _name_domains(axes, next(iter(curve.strategies.values()))[0], top)
    title = f"experts chosen by (bars: {curve.settings['confidence']:.0%} interval)"
    axes.legend(loc="upper right", title=title, alignment="left")


def _name_domains(axes: Axes, point: Point, top: float) -> None:
    """Write names where the domains' lines begin, each a little above the one below where they would overlap."""
    height = -np.inf
    for name, scores in sorted(point.scores.domains.items(), key=lambda item: item[1].excess):
        height = max(scores.excess, height + 0.04 * top)
        where: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 7, "color": FAINT}
        axes.annotate(shortened(name, 10), (point.keep, height), (-7, 0), textcoords="offset points", **where)


def _scales(axes: Axes, curve: Curve, top: float) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    used, n_expert = curve.n_expert_used, curve.model.n_expert
    sizes = sorted({point.keep for points in curve.strategies.values() for point in points})
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    span = max(sizes[-1] / sizes[0], 2.0)
    axes.set_xlim(sizes[0] / span**0.1, sizes[-1] * span**0.06)  # names stand at the left
    axes.set_ylim(-0.04 * max(top, 1e-3), 1.08 * max(top, 1e-3))
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"experts kept per layer, of {n_expert}")
    axes.set_ylabel("loss over the whole model, nats per token")
    axes.grid(axis="y")

    above = axes.secondary_xaxis("top", functions=(partial(np.multiply, 1 / used), partial(np.multiply, used)))
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xticks([size / used for size in sizes])
    above.xaxis.set_major_formatter(plain)
    above.set_xlabel(f"times the {used} experts that a token uses (shaded: {RULE[0]} to {RULE[1]}, the rule of thumb)")

    beside = axes.secondary_yaxis("right", functions=(np.exp, _log))
    limit = 1.08 * top
    ratios = [ratio for ratio in _RATIOS if np.log(ratio) <= limit]
    # Ticks of ratios crowd at the bottom where the scale is long.
    shown = [ratio for at, ratio in enumerate(ratios) if at == 0 or np.log(ratio) - np.log(ratios[at - 1]) > limit / 25]
    beside.set_yticks(shown)
    beside.yaxis.set_major_formatter(plain)
    beside.yaxis.set_minor_locator(NullLocator())
    beside.set_ylabel("perplexity relative to the whole model")


def _log(ratio: npt.ArrayLike) -> npt.NDArray[np.float64]:
    # matplotlib also asks for the inverse of ratios that no loss has.
    found: npt.NDArray[np.float64] = np.log(np.maximum(np.asarray(ratio, dtype=np.float64), 1e-9))
    return found
