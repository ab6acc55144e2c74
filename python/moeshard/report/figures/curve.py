"""The curve of loss by experts kept: drawn, and as a figure of the report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeshard.evaluation.curve import RULE, Curve, Point, rule_of_thumb
from moeshard.evaluation.record import Evaluation
from moeshard.evaluation.scores import Scores
from moeshard.planning.plan import Plan
from moeshard.report.colours import COLOURS, FAINT, INK, MARK
from moeshard.report.drawing import shortened
from moeshard.report.figure import Cell, Figure, Panel, Table, between, nats, percent, times, warnings
from moeshard.report.figures.plan import held

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

HEIGHT = 4.4
"""Inches."""
_RATIOS = (1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
_MARKERS = "osD^vPX*"


def draw_curve(canvas: Canvas, curve: Curve) -> None:
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
                axes.plot(keep, own, color=FAINT, linewidth=0.7, zorder=2)
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


def loss_curve(curve: Curve, plan: Plan | None, evaluation: Evaluation | None) -> Figure:
    """Return the measured loss by the experts kept, with the nodes of a plan on it where theirs is known."""
    n_expert = curve.model.n_expert
    nodes: list[tuple[str, float, Scores]] = []
    if plan is not None and evaluation is not None:
        sizes = [n_expert * held(plan, node) for node in plan.nodes]
        nodes = [(group.name, size, group.scores) for group, size in zip(evaluation.groups, sizes, strict=True)]
        nodes.append(("as placed", float(np.mean(sizes)), evaluation.placed))

    def draw(canvas: Canvas) -> None:
        draw_curve(canvas, curve)
        if nodes:
            _mark(canvas.axes[0], nodes)

    lines: list[list[Cell]] = []
    for name, points in curve.strategies.items():
        for point in points:
            own, fraction, multiple = point.scores, point.keep / n_expert, curve.times_top_k(point)
            lines.append(
                [
                    *(name, point.keep, percent(fraction), f"{multiple:.3g}", nats(own.excess)),
                    *(between(own.excess_ci, nats), times(own.ratio)),
                ]
            )
    rows: list[list[Cell]] = [
        [name, point.keep, point.keep / n_expert, curve.times_top_k(point), *score_numbers(point.scores)]
        for name, points in curve.strategies.items()
        for point in points
    ]
    rows += [
        [name, round(size, 3), size / n_expert, size / curve.n_expert_used, *score_numbers(scores)]
        for name, size, scores in nodes
    ]
    used = curve.n_expert_used
    says = [
        f"A rule of thumb says that {RULE[0]} to {RULE[1]} times the experts that a token uses are enough: "
        f"{RULE[0] * used} to {RULE[1] * used} of {n_expert} here. Measured, for one node that serves all domains:",
        *rule_of_thumb(curve),
        *warnings(curve.likeness),
    ]
    if evaluation is not None and nodes:
        says.append(
            f"The plan's nodes together, each session where it is placed, lose {nats(evaluation.placed.excess)} nats "
            f"per token (star)."
        )
    header = ["strategy", "kept", "fraction", "times top-k", "loss", "interval", "perplexity ratio"]
    return Figure(
        "keep-fraction-loss",
        "What a part of the experts costs",
        says,
        [Panel("loss by experts kept, for a node that serves all domains", draw, HEIGHT)],
        Table(["experts", "keep", "fraction", "times_top_k", "nll", "excess", "low", "high"], rows),
        [("Loss over the full model, nats per token", Table(header, lines))],
    )


def _mark(axes: Axes, nodes: Sequence[tuple[str, float, Scores]]) -> None:
    """Mark nodes on a curve, the last one being all of them together."""
    low, high = axes.get_xlim()
    sizes = [size for _, size, _ in nodes]
    axes.set_xlim(min(low, 0.93 * min(sizes)), max(high, 1.07 * max(sizes)))
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, max(top, *(1.05 * scores.excess_ci[1] for _, _, scores in nodes)))
    for index, (_, size, scores) in enumerate(nodes):
        below, above = scores.excess_ci
        spread = [[max(0.0, scores.excess - below)], [max(0.0, above - scores.excess)]]
        together = index == len(nodes) - 1
        label = "the plan, as placed" if together else "nodes of the plan, for all domains" if index == 0 else None
        style: dict[str, Any] = {"fmt": "x", "color": INK, "markersize": 6, "markeredgewidth": 1.5, "zorder": 4}
        if together:
            style = {"fmt": "*", "color": MARK, "markersize": 12, "zorder": 5}
        axes.errorbar([size], [scores.excess], spread, capsize=2, label=label, **style)
    previous = axes.get_legend()
    title = "" if previous is None else previous.get_title().get_text()
    axes.legend(loc="upper right", title=title, alignment="left")


def score_numbers(scores: Scores) -> list[float]:
    return [scores.nll, scores.excess, *scores.excess_ci]
