"""Figures of a profile: where the saliency is, how concentrated the mass is, and which experts stand out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from moeshard.arrays import Doubles
from moeshard.planning.strategies import best
from moeshard.profile.record import Profile
from moeshard.profile.statistics import (
    SUPER_EXPERT,
    concentration,
    mean_entropy,
    peak_ratios,
    share_errors,
    shares,
    summed_concentration,
    super_experts,
    tops,
    verdict,
)
from moeshard.report.colours import COLOURS, FAINT, INK, MARK, PICTURED
from moeshard.report.drawing import heat_map
from moeshard.report.figure import Cell, Figure, Panel, Table, counted, listed, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_SALIENT = 5
"""Experts of each layer that the table names."""
_DOTS = 1500
_LISTED = 12
"""Super experts that the text names."""


def heat(profile: Profile) -> Figure:
    """Return the map layer by expert of shares of saliency, of all domains and of each."""
    share, errors = shares(profile), share_errors(profile)
    by_domain = [shares(profile, "saliency", [name]) for name in profile.domains] if len(profile.domains) > 1 else []
    maps = [share, *by_domain]
    labels = ["all domains" if len(profile.domains) > 1 else "".join(profile.domains), *profile.domains][: len(maps)]
    # Domains have one scale, to be compared. What is above a scale has its brightest colour: a few experts far above
    # all others would leave the rest dark.
    tops_of = [_scale([share]), *[_scale(by_domain)] * len(by_domain)]
    height = min(7.5, 2.0 + 0.1 * profile.layers.size)
    panels = [
        _heat_panel(profile, label, values, top, height)
        for label, values, top in zip(labels, maps, tops_of, strict=True)
    ]
    header = ["layer", "expert", "share", "standard_error", *(f"share {name}" for name in labels[1:])]
    rows: list[list[Cell]] = [
        [int(layer), expert, *(float(v[row, expert]) for v in (share, errors, *by_domain))]
        for row, layer in enumerate(profile.layers)
        for expert in range(profile.n_expert)
    ]
    says = [_say_heaviest(profile, share, errors), *_say_domains(profile), str(verdict(profile))]
    most = _most_salient(profile, share, errors)
    return Figure("heatmap", "Who carries the traffic", says, panels, Table(header, rows), [most])


def _scale(maps: Sequence[Doubles]) -> float:
    return float(np.quantile(np.concatenate([values.ravel() for values in maps]), 0.998)) if maps else 1.0


def _heat_panel(profile: Profile, label: str, values: Doubles, top: float, height: float) -> Panel:
    def draw(canvas: Canvas) -> None:
        axes = heat_map(canvas, 100 * values, 100 * top, "% of saliency")
        axes.set_xlabel("expert")
        layer_axis(axes, profile)
        rows, experts = np.nonzero(super_experts(profile))
        # In two colours: one of them stands out on any of the map.
        for colour, width in (("#ffffff", 3.0), (MARK, 1.5)):
            axes.plot(experts, rows, "o", mfc="none", mec=colour, markersize=8, markeredgewidth=width)

    return Panel(label, draw, height)


def layer_axis(axes: Axes, profile: Profile) -> None:
    """Label rows with the layers they are, as many as there is room for."""
    step = -(-profile.layers.size // 16)
    axes.set_yticks(range(0, profile.layers.size, step), [str(layer) for layer in profile.layers[::step]])
    axes.set_ylabel("layer")


def _say_heaviest(profile: Profile, share: Doubles, errors: Doubles) -> str:
    row, expert = np.unravel_index(int(share.argmax()), share.shape)
    even = 1 / profile.n_expert
    mean = float(share.max(axis=1).mean())
    return (
        f"The heaviest expert of a layer carries {percent(mean)} of its saliency on average, {mean / even:.1f} times "
        f"an even share ({percent(even)}). The heaviest of all is expert {expert} of layer {profile.layers[row]} with "
        f"{percent(float(share[row, expert]))} ± {percent(float(errors[row, expert]))} (standard error)."
    )


def _say_domains(profile: Profile) -> list[str]:
    measured = [name for name in profile.domains if profile.select([name]).any()]
    if len(measured) < 2:
        return []
    size = max(1, profile.n_expert // 4)
    kept = {name: best(profile.total("saliency", [name]), size) for name in measured}
    common = {
        pair: float((kept[pair[0]] & kept[pair[1]]).sum(axis=1).mean()) / size for pair in combinations(measured, 2)
    }
    nearest, farthest = max(common, key=lambda pair: common[pair]), min(common, key=lambda pair: common[pair])
    mean = float(np.mean(list(common.values())))
    text = (
        f"Of the {counted(size, 'expert')} of a layer that matter most to one domain, {percent(mean)} are among the "
        f"{size} of another on average; by chance it would be {percent(size / profile.n_expert)}."
    )
    if len(common) > 1:
        text += (
            f" Most alike are {nearest[0]} and {nearest[1]} ({percent(common[nearest])}), least {farthest[0]} and "
            f"{farthest[1]} ({percent(common[farthest])})."
        )
    return [text]


def _most_salient(profile: Profile, share: Doubles, errors: Doubles) -> tuple[str, Table]:
    number = min(_SALIENT, profile.n_expert)
    rows: list[list[Cell]] = []
    for layer, own, error in zip(profile.layers, share, errors, strict=True):
        order = np.argsort(-own, kind="stable")[:number]
        rows.append([int(layer), *(f"{expert}: {percent(own[expert])} ± {percent(error[expert])}" for expert in order)])
    header = ["layer", *(f"{place}." for place in range(1, number + 1))]
    return "Most salient experts of each layer: id, share, standard error", Table(header, rows)


def concentrated(profile: Profile) -> Figure:
    """Return how much of each layer's gate mass its best experts carry."""
    shown = tops(profile.n_expert)
    every = range(1, profile.n_expert + 1)
    curves, by_id = concentration(profile, every), summed_concentration(profile, every)
    found, entropy = concentration(profile, shown), mean_entropy(profile)

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        x = np.arange(profile.n_expert + 1)
        for index, curve in enumerate(curves):
            label = "each layer" if index == 0 else None
            axes.plot(x, [0, *(100 * curve)], color=COLOURS[0], alpha=0.6, linewidth=0.6, label=label)
        axes.plot(x, [0, *(100 * curves.mean(axis=0))], color=COLOURS[0], linewidth=2.2, label="mean of the layers")
        if len(curves) > 1:
            axes.plot(x, [0, *(100 * by_id)], color=COLOURS[1], linestyle="--", label="summed over ids (misleads)")
        axes.plot([0, profile.n_expert], [0, 100], color=FAINT, linestyle=":", label="equal experts")
        axes.set(xlabel="best experts", ylabel="% of gate mass", xlim=(0, profile.n_expert), ylim=(0, 101))
        axes.grid()
        axes.legend(loc="lower right")

    header = ["layer", *(f"top {top}" for top in shown)]
    numbers: list[list[Cell]] = [
        [int(layer), *map(float, row)] for layer, row in zip(profile.layers, curves, strict=True)
    ]
    numbers.append(["summed over ids", *map(float, by_id)])
    table: list[list[Cell]] = [
        [int(layer), *map(percent, row), f"{nats:.2f}"]
        for layer, row, nats in zip(profile.layers, found, entropy, strict=True)
    ]
    table.append(["mean", *map(percent, found.mean(axis=0)), f"{entropy.mean():.2f}"])
    table.append(
        ["equal experts", *(percent(top / profile.n_expert) for top in shown), f"{np.log(profile.n_expert):.2f}"]
    )
    table.append(["summed over ids", *map(percent, summed_concentration(profile, shown)), ""])
    return Figure(
        "concentration",
        "How concentrated a layer is",
        _say_concentration(profile),
        [Panel("share of gate mass by number of best experts", draw, 3.4)],
        Table(["layer", *(f"top {top}" for top in every)], numbers),
        [
            (
                "Share of a layer's gate mass that its best experts carry; entropy of the router in nats",
                Table([*header, "entropy"], table),
            )
        ],
    )


def _say_concentration(profile: Profile) -> list[str]:
    shown = tops(profile.n_expert)
    size = shown[1] if len(shown) > 2 else max(1, profile.n_expert // 4)
    own = concentration(profile, [size])[:, 0]
    text = f"The {counted(size, 'expert')} of most mass in a layer carry {percent(own.mean())} of it on average"
    if own.size == 1:
        text = f"The {counted(size, 'expert')} of most mass in the layer carry {percent(own[0])} of it"
    elif own.max() - own.min() > 0.005:
        low, high = profile.layers[own.argmin()], profile.layers[own.argmax()]
        text += f" (from {percent(own.min())} in layer {low} to {percent(own.max())} in layer {high})"
    says = [f"{text}; equal experts would carry {percent(size / profile.n_expert)}."]
    if own.size > 1:
        held = float(summed_concentration(profile, [size])[0])
        says.append(
            f"“Summed over ids” is the older view, and it misleads: expert 5 of one layer and expert 5 of another are "
            f"unrelated, so that mass summed over layers by id comes out flat however concentrated each layer is. Its "
            f"{size} best ids have {percent(held)} of the sum, and that is also what is held of the layers' mass when "
            f"they are kept in every layer; the {size} best of each layer hold {percent(own.mean())}."
        )
    return says


def outstanding(profile: Profile) -> Figure:
    """Return the largest output of every expert, in medians of its layer, and which are super experts."""
    ratios, found = peak_ratios(profile), super_experts(profile)

    def draw(canvas: Canvas) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes = canvas.add_subplot()
        rows = np.repeat(np.arange(profile.layers.size), profile.n_expert)
        values, stand_out = np.maximum(ratios.ravel(), 1e-3), found.ravel()
        # Tens of thousands of dots would make a large page: then as a picture, which has colours of its own.
        many = bool(values.size > _DOTS)
        colour = PICTURED if many else COLOURS[0]
        axes.plot(rows[~stand_out], values[~stand_out], "o", color=colour, markersize=2.5, mew=0, rasterized=many)
        axes.plot(rows[stand_out], values[stand_out], "o", color=MARK, markersize=5)
        axes.axhline(SUPER_EXPERT, color=MARK, linestyle="--", linewidth=1)
        axes.text(
            1,
            SUPER_EXPERT * 1.05,
            "super experts",
            color=INK,
            fontsize=8,
            ha="right",
            va="bottom",
            transform=axes.get_yaxis_transform(),
        )
        axes.set_yscale("log")
        # As plain numbers; powers of ten would need the formulas that are switched off for names' sake.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(max(1e-2, 0.8 * values.min()), 1.5 * max(SUPER_EXPERT, values.max()))
        step = -(-profile.layers.size // 16)
        axes.set_xticks(range(0, profile.layers.size, step), [str(layer) for layer in profile.layers[::step]])
        axes.set_xlim(-0.6, profile.layers.size - 0.4)
        axes.set(xlabel="layer", ylabel="largest output / median of the layer")
        axes.grid(axis="y")

    rows: list[list[Cell]] = [
        [int(layer), expert, float(ratios[row, expert]), int(found[row, expert])]
        for row, layer in enumerate(profile.layers)
        for expert in range(profile.n_expert)
    ]
    tables = []
    if found.any():
        lines: list[list[Cell]] = [
            [int(profile.layers[row]), int(expert), f"{ratios[row, expert]:.1f}"] for row, expert in np.argwhere(found)
        ]
        tables.append(("Super experts", Table(["layer", "expert", "times the median"], lines)))
    return Figure(
        "super-experts",
        "Super experts",
        [_say_super(profile, ratios, found)],
        [Panel("largest output of each expert", draw, 2.8)],
        Table(["layer", "expert", "times_median", "super"], rows),
        tables,
    )


def _say_super(profile: Profile, ratios: Doubles, found: np.ndarray) -> str:
    if not found.any():
        row, expert = np.unravel_index(int(ratios.argmax()), ratios.shape)
        return (
            f"No expert's largest output is more than {SUPER_EXPERT:.0f} times its layer's median, so none has to be "
            f"protected for that. The largest is {ratios[row, expert]:.1f} times: expert {expert} of layer "
            f"{profile.layers[row]}."
        )
    where: Sequence[str] = [f"{expert} of layer {profile.layers[row]}" for row, expert in np.argwhere(found)]
    number = int(found.sum())
    return (
        f"{counted(number, 'expert')} of {found.size} {'has' if number == 1 else 'have'} outputs more than "
        f"{SUPER_EXPERT:.0f} times their layer's median: {listed(where, _LISTED)}. Models break when such experts are "
        f"dropped; the strategy islands keeps them on every node."
    )
