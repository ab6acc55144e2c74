"""Figures of what is lost: the measured curve, node by node, as placed, and answers that end in loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moeshard.evaluation.record import Evaluation
from moeshard.evaluation.scores import Scores
from moeshard.report.colours import COLOURS, FAINT, MARK
from moeshard.report.drawing import intervals, matrix
from moeshard.report.figure import (
    Cell,
    Figure,
    Panel,
    Table,
    between,
    counted,
    nats,
    percent,
    short_nats,
    times,
    warnings,
)
from moeshard.report.figures.curve import score_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_ROW = 0.26
"""Inches of a line with a dot and its interval."""


def loss_matrix(evaluation: Evaluation) -> Figure:
    """Return what each node loses in each domain."""
    names, domains = [group.name for group in evaluation.groups], evaluation.domains
    excess = np.array([[group.scores.domains[name].excess for group in evaluation.groups] for name in domains])
    best = excess.argmin(axis=1)
    marked = np.arange(len(names))[None] == best[:, None]

    def draw(canvas: Canvas) -> None:
        matrix(canvas, excess, domains, names, short_nats, marked=marked if len(names) > 1 else None, reverse=True)

    rows: list[list[Cell]] = []
    lines: list[list[Cell]] = []
    for i, domain in enumerate(domains):
        line: list[Cell] = [domain]
        for j, group in enumerate(evaluation.groups):
            own = group.scores.domains[domain]
            rows.append([domain, group.name, *score_numbers(own), int(best[i] == j)])
            line.append(f"{nats(own.excess)} ({between(own.excess_ci, nats)})")
        lines.append(line)
    least, worst = int(excess.min(axis=1).argmin()), int(excess.min(axis=1).argmax())
    says = [
        f"The node loses from {nats(excess.min())} ({domains[least]}) to {nats(excess.max())} ({domains[worst]}) nats "
        f"per token over the full model."
    ]
    if len(names) > 1:
        says = [
            f"On its best node (framed) a domain loses {nats(excess.min(axis=1).mean())} nats per token over the full "
            f"model on average, on its worst {nats(excess.max(axis=1).mean())}. Served worst even there is "
            f"{domains[worst]} ({nats(excess[worst].min())})."
        ]
    return Figure(
        "losses",
        "What each node loses in each domain",
        says,
        [Panel("loss over the full model by domain and node, nats per token", draw, 1.1 + 0.28 * len(domains))],
        Table(["domain", "node", "nll", "excess", "low", "high", "best"], rows),
        [
            (
                f"Nats per token over the full model, with intervals of {percent(evaluation.settings.confidence)}",
                Table(["domain", *names], lines),
            )
        ],
    )


def comparison(evaluation: Evaluation) -> Figure:
    """Return the full model, the oracle, sessions as placed, hashed sessions, and each node by itself."""
    ways = list(_ways(evaluation))

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        intervals(
            axes,
            [name for name, _, _ in ways],
            [scores.excess for _, scores, _ in ways],
            [scores.excess_ci for _, scores, _ in ways],
            [colour for _, _, colour in ways],
        )
        axes.axvline(0, color=FAINT, linewidth=0.8)
        axes.set_xlabel("loss over the full model, nats per token")

    rows: list[list[Cell]] = []
    lines: list[list[Cell]] = []
    for name, own, _ in ways:
        agreement = own.agreement
        numbers: list[Cell] = [own.nll, *own.nll_ci, own.excess, *own.excess_ci]
        texts: list[Cell] = [
            nats(own.nll),
            f"{nats(own.excess)} ({between(own.excess_ci, nats)})",
            times(own.perplexity),
            f"{times(own.ratio)} ({between(own.ratio_ci, times)})",
        ]
        if agreement is None:
            numbers += ["", "", ""]
            texts += ["", "", ""]
        else:
            numbers += [agreement.kl, agreement.kl_p99, agreement.top1]
            texts += [nats(agreement.kl), nats(agreement.kl_p99), percent(agreement.top1)]
        rows.append([name, *numbers])
        lines.append([name, *texts])
    header = ["", "loss", "over full", "perplexity", "ratio", "KL mean", "KL 99%", "same top token"]
    probes: list[list[Cell]] = [
        [
            name,
            nats(own.excess),
            percent(own.right),
            f"{nats(own.regret)} ({between(own.regret_ci, nats)})",
        ]
        for name, own in evaluation.probes.items()
    ]
    tables = [("Loss in nats per token", Table(header, lines))]
    if probes:
        tables.append(
            (
                "How well a prompt says where its session belongs",
                Table(["probe", "over full", "right", "regret"], probes),
            )
        )
    return Figure(
        "comparison",
        "What sessions lose",
        _say_comparison(evaluation),
        [Panel("loss over the full model, with intervals", draw, 0.8 + _ROW * len(ways))],
        Table(
            ["way", "nll", "nll_low", "nll_high", "excess", "low", "high", "kl", "kl_p99", "top1"],
            rows,
        ),
        tables,
    )


def _ways(evaluation: Evaluation) -> Iterator[tuple[str, Scores, str]]:
    yield "full model", evaluation.full, FAINT
    yield "oracle", evaluation.oracle, COLOURS[2]
    yield "as placed", evaluation.placed, MARK
    yield "hashed", evaluation.hashed, COLOURS[1]
    for group in evaluation.groups:
        yield group.name, group.scores, COLOURS[0]


def _say_comparison(evaluation: Evaluation) -> list[str]:
    return [*_say_losses(evaluation), *warnings(evaluation.settings.likeness)]


def _say_losses(evaluation: Evaluation) -> list[str]:
    placed, hashed, oracle = evaluation.placed, evaluation.hashed, evaluation.oracle
    confidence = percent(evaluation.settings.confidence)
    if len(evaluation.groups) == 1:
        return [
            f"The node loses {nats(placed.excess)} nats per token ({between(placed.excess_ci, nats)}, {confidence} "
            f"interval) over the full model: its perplexity is {placed.ratio:.2f} times as large."
        ]
    says = [
        f"Placed by their first {counted(evaluation.settings.prompt, 'token')}, sessions lose {nats(placed.excess)} "
        f"nats per token ({between(placed.excess_ci, nats)}, {confidence} interval) over the full model: perplexity is "
        f"{placed.ratio:.2f} times as large. Sent to nodes at random, as hashing does, they lose {nats(hashed.excess)}."
    ]
    own = evaluation.probes[evaluation.probe]
    says.append(
        f"The probe ({evaluation.probe}) finds the best node for {percent(own.right)} of the sessions. An oracle that "
        f"knows it for all would lose {nats(oracle.excess)}: the probe loses {nats(own.regret)} more "
        f"({between(own.regret_ci, nats)})."
    )
    return says


def loops(evaluation: Evaluation) -> Figure | None:
    """Return how often answers end in loops; None where none were written."""
    found = evaluation.loops
    if found is None:
        return None
    rates = {"full model": found.full, **found.groups, "as placed": found.placed}
    whole, placed = found.full, found.placed

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        axes.axvspan(100 * whole.ci[0], 100 * whole.ci[1], color=FAINT, alpha=0.18, linewidth=0)
        intervals(
            axes,
            list(rates),
            [100 * own.rate for own in rates.values()],
            [[100 * end for end in own.ci] for own in rates.values()],
            [FAINT, *[COLOURS[0]] * len(found.groups), MARK],
        )
        axes.set_xlabel("% of answers that are loops")

    inside = whole.ci[0] <= placed.rate <= whole.ci[1]
    where = "inside" if inside else "below" if placed.rate < whole.ci[0] else "above"
    says = (
        f"As placed, {percent(placed.rate)} of {counted(placed.n, 'answer')} of {counted(found.tokens, 'token')} are "
        f"loops, {where} the interval of the full model's {percent(whole.rate)} ({between(whole.ci, percent)}, the "
        f"grey band). The thresholds were learned on other answers of the full model, so what is flagged of its own "
        f"are false alarms: a rate of {percent(found.false_alarms)}."
    )
    rows: list[list[Cell]] = [[name, own.rate, *own.ci, own.n] for name, own in rates.items()]
    lines: list[list[Cell]] = [
        [name, percent(own.rate), between(own.ci, percent), own.n] for name, own in rates.items()
    ]
    return Figure(
        "loops",
        "Answers that end in loops",
        [says],
        [Panel("share of answers that are loops, with intervals", draw, 0.8 + _ROW * len(rates))],
        Table(["way", "rate", "low", "high", "answers"], rows),
        [("Rate of loops", Table(["", "rate", "interval", "answers"], lines))],
        [(f"A loop: {example.node}, {example.domain}", example.text) for example in found.examples],
    )
