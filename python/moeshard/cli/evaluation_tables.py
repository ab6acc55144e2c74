"""Tables of an evaluation, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeshard.cli.output import plain_table, show
from moeshard.cli.terminal import say

if TYPE_CHECKING:
    from rich.table import Table

    from moeshard.evaluation.loops import Rate
    from moeshard.evaluation.record import Evaluation
    from moeshard.evaluation.scores import Interval, Scores

FULL = "full"
PLACED = "placed"


def report(found: Evaluation) -> None:
    """Print what each node loses, by domain, how well sessions are placed, and how often answers are loops."""
    rows = _rows(found)
    show(_totals(found, rows), "", _by_domain(found, rows), "")
    for line in _probes(found):
        say(line)
    if found.alarms is not None:
        say(_about_alarms(found))
    if found.loops is not None:
        say()
        show(_loops(found))
        say(_about_loops(found))


def _rows(found: Evaluation) -> dict[str, Scores]:
    nodes = {group.name: group.scores for group in found.groups}
    return {FULL: found.full, **nodes, "hashed": found.hashed, PLACED: found.placed, "oracle": found.oracle}


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = plain_table(title)
    table.add_column(first, no_wrap=True)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _totals(found: Evaluation, rows: dict[str, Scores]) -> Table:
    columns = ("perplexity", "× full", "interval", "KL", "KL p99", "top-1")
    table = _table("Perplexity after the prompts; distance from the full model", "", columns)
    for name, scores in rows.items():
        cells = [f"{scores.perplexity:.2f}"]
        if scores.agreement is not None:
            own = scores.agreement
            cells += [f"{scores.ratio:.3f}", _span(scores.ratio_ci, ".3f")]
            cells += [f"{own.kl:.3f}", f"{own.kl_p99:.2f}", f"{own.top1:.1%}"]
        table.add_row(name, *cells, style="bold" if name == PLACED else None)
    return table


def _by_domain(found: Evaluation, rows: dict[str, Scores]) -> Table:
    """Ratios of perplexity. A row for each domain where the nodes fit side by side, else one for each node."""
    ways = [name for name in rows if name != FULL]
    if len(ways) <= max(7, len(found.domains) - 3):
        title = "By domain, relative to the full model's perplexity; interval as placed"
        table = _table(title, "domain", [FULL, *ways, "interval"])
        for domain in found.domains:
            ratios = [f"{rows[way].domains[domain].ratio:.2f}" for way in ways]
            interval = _span(found.placed.domains[domain].ratio_ci, ".2f")
            table.add_row(domain, f"{found.full.domains[domain].perplexity:.1f}", *ratios, interval)
        return table
    table = _table("By domain, relative to the full model's perplexity", "", found.domains)
    table.add_row(FULL, *(f"{found.full.domains[domain].perplexity:.1f}" for domain in found.domains))
    for way in ways:
        style = "bold" if way == PLACED else None
        table.add_row(way, *(f"{rows[way].domains[domain].ratio:.2f}" for domain in found.domains), style=style)
    return table


def _probes(found: Evaluation) -> list[str]:
    lines = []
    for name, probe in found.probes.items():
        mark = " (this one counts)" if name == found.probe else ""
        lines.append(
            f"Placed by {name}{mark}, {probe.right:.0%} of sessions are on their best node, and all of them together "
            f"lose {probe.regret:.3f} nats per token over it [{_span(probe.regret_ci, '.3f')}]."
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found.share.items())
    return [*lines, f"Sessions as placed: {shares}."]


def _about_alarms(found: Evaluation) -> str:
    alarms = found.alarms
    assert alarms is not None
    relation = alarms.relation
    able = [node.name for node in alarms.nodes if node.limits is not None]
    return (
        f"With each tenth of the routing weight that text misses, it loses {relation.slope / 10:.2f} nats per token, "
        f"± {relation.scatter:.2f} over 32 tokens (correlation {relation.correlation:.2f}). When to look at sessions "
        f"again was learned for {', '.join(able) or 'no node: there are too few windows'}."
    )


def _loops(found: Evaluation) -> Table:
    loops = found.loops
    assert loops is not None
    table = _table("Answers that are degenerate loops", "", ("share", "interval", "answers"))
    rows: dict[str, Rate] = {FULL: loops.full, **loops.groups, PLACED: loops.placed}
    for name, rate in rows.items():
        cells = (f"{rate.rate:.1%}", _span(rate.ci, ".1%"), str(rate.n))
        table.add_row(name, *cells, style="bold" if name == PLACED else None)
    return table


def _about_loops(found: Evaluation) -> str:
    loops = found.loops
    assert loops is not None
    return (
        f"A loop: more than {loops.thresholds.repetition:.0%} of 4-grams repeated, or an entropy of the last tokens "
        f"below {loops.thresholds.entropy:.2f} of the largest. Learned on as many other answers of the full model; "
        f"its own share is the rate of false alarms."
    )


def _span(interval: Interval, form: str) -> str:
    return f"{interval[0]:{form}}–{interval[1]:{form}}"
