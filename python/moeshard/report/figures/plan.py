"""Figures of a plan: what its nodes capture, what they share, and where they are on the keep-fraction curve."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from moeshard.arrays import Doubles
from moeshard.planning.plan import Plan, PlanNode
from moeshard.profile.record import Profile
from moeshard.profile.statistics import captured, captured_curve
from moeshard.report.colours import COLOURS, FAINT, MARK
from moeshard.report.drawing import matrix, shortened
from moeshard.report.figure import Cell, Figure, Panel, Table, between, counted, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_POINTS = 16


def held(plan: Plan, node: PlanNode) -> float:
    """Return the share of the model's experts that a node holds."""
    return float(node.keep[plan.model.moe_layers].mean())


def captured_shares(plan: Plan, profile: Profile | None) -> tuple[list[str], Doubles] | None:
    """Return domains (D) and float64 (D, G), the shares of their saliency that the nodes hold.

    By the profile, or by what the planner wrote into the plan; None where there is neither.
    """
    if profile is not None:
        domains = [name for name in profile.domains if profile.select([name]).any()]
        return domains, np.array([[captured(profile, node.keep, [name]) for node in plan.nodes] for name in domains])
    said = [node.facts.get("captured") for node in plan.nodes]
    first = said[0]
    if not isinstance(first, dict) or not first:
        return None
    # Facts are free: another planner may have written anything.
    domains = list(first)
    rows = [[own.get(name) if isinstance(own, dict) else None for own in said] for name in domains]
    if not all(isinstance(value, (int, float)) for row in rows for value in row):
        return None
    return domains, np.array(rows, dtype=np.float64)


def keep_curve(profile: Profile, plan: Plan | None) -> Figure:
    """Return the captured share of saliency by the fraction of experts kept, with the plan's nodes on it."""
    n_expert = profile.n_expert
    sizes = sorted({max(1, round(n_expert * step / _POINTS)) for step in range(1, _POINTS + 1)})
    share, low, high = captured_curve(profile, sizes)
    nodes = [] if plan is None else [(node.name, held(plan, node), captured(profile, node.keep)) for node in plan.nodes]
    placed = None
    if plan is not None and len(plan.nodes) > 1 and len(profile.domains) > 1:
        found = captured_shares(plan, profile)
        assert found is not None
        placed = float(found[1].max(axis=1).mean())

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        x = 100 * np.array(sizes) / n_expert
        errors = 100 * np.array([np.maximum(share - low, 0), np.maximum(high - share, 0)])
        axes.errorbar(
            x,
            100 * share,
            errors,
            color=COLOURS[0],
            marker="o",
            markersize=3,
            capsize=2,
            label="best experts per layer",
        )
        axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", label="experts chosen by chance")
        if nodes:
            axes.plot(
                [100 * own for _, own, _ in nodes],
                [100 * value for _, _, value in nodes],
                "D",
                color=COLOURS[1],
                markersize=5,
                label="nodes of the plan, all domains",
            )
        if placed is not None:
            mean = 100 * float(np.mean([own for _, own, _ in nodes]))
            axes.plot([mean], [100 * placed], "*", color=MARK, markersize=11, label="each domain on its best node")
        axes.set(xlabel="% of experts kept", ylabel="% of saliency held", xlim=(0, 101), ylim=(0, 102))
        axes.grid()
        axes.legend(loc="lower right")

    rows: list[list[Cell]] = [
        ["best per layer", size, size / n_expert, float(share[i]), float(low[i]), float(high[i])]
        for i, size in enumerate(sizes)
    ]
    rows += [[name, round(own * n_expert, 3), own, value, "", ""] for name, own, value in nodes]
    numbers: list[list[Cell]] = [
        [size, percent(size / n_expert), percent(share[i]), between((low[i], high[i]), percent)]
        for i, size in enumerate(sizes)
    ]
    return Figure(
        "keep-fraction",
        "What a part of the experts holds",
        _say_curve(profile, share, nodes, placed, sizes),
        [Panel("share of saliency held by fraction of experts kept", draw, 3.4)],
        Table(["experts", "keep", "fraction", "captured", "low", "high"], rows),
        [("Best experts of each layer", Table(["kept", "fraction", "saliency held", "95% interval"], numbers))],
    )


def _say_curve(
    profile: Profile,
    share: Doubles,
    nodes: Sequence[tuple[str, float, float]],
    placed: float | None,
    sizes: Sequence[int],
) -> list[str]:
    quarter = int(np.abs(np.array(sizes) - profile.n_expert / 4).argmin())
    enough = int(np.argmax(share >= 0.9))
    says = [
        f"The best {sizes[quarter]} of {profile.n_expert} experts per layer hold {percent(share[quarter])} of the "
        f"saliency of all domains together; to hold {percent(share[enough])} takes {sizes[enough]}. Bars are intervals "
        f"of 95% over sequences. Missing saliency hints at loss; moeshard curve measures the loss itself."
    ]
    if nodes:
        values = [value for _, _, value in nodes]
        text = f"The plan's node holds {percent(values[0])}"
        if len(values) > 1:
            text = f"The plan's nodes hold {percent(min(values))} to {percent(max(values))}"
        text += " of the saliency of all domains"
        if placed is not None:
            text += f"; with each domain on its best node it is {percent(placed)}"
        says.append(text + ".")
    return says


def captured_matrix(plan: Plan, profile: Profile | None) -> Figure | None:
    """Return the share of each domain's saliency that each node holds; None where nothing is known of it."""
    found = captured_shares(plan, profile)
    if found is None:
        return None
    domains, shares = found
    names = [node.name for node in plan.nodes]
    best = shares == shares.max(axis=1, keepdims=True)

    def draw(canvas: Canvas) -> None:
        matrix(canvas, shares, domains, names, percent, marked=best if len(names) > 1 else None)

    favourites = shares.argmax(axis=1)
    used = len(set(favourites.tolist()))
    says = [f"The node holds {percent(shares.mean())} of a domain's saliency on average."]
    if len(names) > 1:
        says = [
            f"On its best node (framed) {percent(shares.max(axis=1).mean())} of a domain's saliency is held on "
            f"average, on a node chosen by chance {percent(shares.mean())}. "
            f"{counted(used, 'node')} of {len(names)} {'is' if used == 1 else 'are'} the best for some domain."
        ]
    rows: list[list[Cell]] = [
        [domain, name, float(shares[i, j]), int(favourites[i] == j)]
        for i, domain in enumerate(domains)
        for j, name in enumerate(names)
    ]
    lines: list[list[Cell]] = [[domain, *map(percent, row)] for domain, row in zip(domains, shares, strict=True)]
    return Figure(
        "captured",
        "What the nodes hold of each domain",
        says,
        [Panel("share of saliency by domain and node", draw, 1.1 + 0.28 * len(domains))],
        Table(["domain", "node", "captured", "best"], rows),
        [("Share of saliency held", Table(["domain", *names], lines))],
    )


def _pair(found: tuple[float, str, str]) -> str:
    return f"{shortened(found[1])} and {shortened(found[2])} ({percent(found[0])})"


def overlap(plan: Plan) -> Figure | None:
    """Return which part of each node's experts the others hold too; None for a single node."""
    if len(plan.nodes) < 2:
        return None
    keeps = np.stack([node.keep[plan.model.moe_layers] for node in plan.nodes]).astype(np.float64)
    sizes = np.maximum(keeps.sum(axis=2), 1)
    common = (np.einsum("ame,bme->abm", keeps, keeps) / sizes[:, None]).mean(axis=2)
    names = [node.name for node in plan.nodes]

    def draw(canvas: Canvas) -> None:
        shown = common.copy()
        np.fill_diagonal(shown, np.nan)
        axes = matrix(canvas, shown, names, names, percent)
        axes.set_ylabel("of the experts of …")

    others = ~np.eye(len(names), dtype=bool)
    chance = np.broadcast_to(keeps.mean(axis=(1, 2))[None], common.shape)[others].mean()
    homes = keeps.sum(axis=0)
    counts = np.array([(homes == number).mean() for number in range(len(names) + 1)])
    pairs = [(float(common[i, j]), names[i], names[j]) for i, j in combinations(range(len(names)), 2)]
    least, most = min(pairs), max(pairs)
    says = [
        f"Two nodes have {percent(common[others].mean())} of their experts in common on average; chosen by chance it "
        f"would be {percent(chance)}."
        + (f" Most: {_pair(most)}; fewest: {_pair(least)}." if most[0] - least[0] > 0.005 else ""),
        f"{percent(counts[-1])} of the experts are on every node, {percent(counts[1])} on one only, and "
        f"{percent(counts[0])} on none.",
    ]
    rows: list[list[Cell]] = [
        [one, other, float(common[i, j])] for i, one in enumerate(names) for j, other in enumerate(names)
    ]
    lines: list[list[Cell]] = [[number, percent(part)] for number, part in enumerate(counts)]
    return Figure(
        "overlap",
        "What nodes have in common",
        says,
        [Panel("share of a node's experts that another holds too", draw, 1.1 + 0.28 * len(names))],
        Table(["node", "other", "share_of_node"], rows),
        [("On how many nodes an expert is", Table(["nodes", "share of experts"], lines))],
    )
