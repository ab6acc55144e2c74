"""What a reader wants to know first, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator

from moeshard.evaluation.curve import Curve, Point
from moeshard.evaluation.record import Evaluation
from moeshard.evaluation.scores import Interval, Scores
from moeshard.planning.plan import Plan
from moeshard.planning.planner import WHOLE_MEMORY
from moeshard.profile.statistics import captured, verdict
from moeshard.report.figure import between, counted, listed, percent, warnings
from moeshard.report.sources import Sources

_GIB = 2**30


def summary(sources: Sources) -> list[str]:
    """Return the verdict: what is held, what that costs, how far to trust it. The first sentence says most."""
    return [sentence for sentence in _sentences(sources) if sentence]


def _sentences(sources: Sources) -> Iterator[str]:
    profile, plan, evaluation, curve = sources.profile, sources.plan, sources.evaluation, sources.curve
    if evaluation is not None:
        yield f"{_held(plan, evaluation)}: {_lost(evaluation.placed)}."
        if len(evaluation.groups) > 1:
            yield (
                f"That is with each session on the node that its prompt is placed on. On the best node for each it "
                f"would be {_change(evaluation.oracle.ratio)}, on any node {_change(evaluation.hashed.ratio)}."
            )
        yield _loops(evaluation)
        yield from warnings(evaluation.settings.likeness)
    elif curve is not None:
        yield _of_curve(curve)
        yield from warnings(curve.likeness)
    elif plan is not None:
        yield f"{_held(plan, None)}."
    if evaluation is None and curve is None:
        if profile is not None and plan is not None:
            shares = [captured(profile, node.keep) for node in plan.nodes]
            span = percent(shares[0]) if len(shares) == 1 else between((min(shares), max(shares)), percent)
            yield f"Of the saliency of all traffic {'it holds' if len(shares) == 1 else 'they hold'} {span}."
        yield "What that loses is not measured yet; moeshard evaluate and moeshard curve measure it."
    if profile is not None:
        yield str(verdict(profile))


def _held(plan: Plan | None, evaluation: Evaluation | None) -> str:
    """What the nodes hold, as the beginning of a sentence."""
    number = len(plan.nodes) if plan is not None else len(evaluation.groups) if evaluation is not None else 0
    nodes = "One node" if number == 1 else f"{counted(number, 'node')}"
    if plan is None:
        return nodes
    shares = [float(node.keep[plan.model.moe_layers].mean()) for node in plan.nodes]
    each = "" if number == 1 else " each"
    text = f"{nodes} with {_span([percent(share) for share in shares])} of the experts{each}"
    memory = _memory(plan)
    return f"{text} ({memory})" if memory else text


def _memory(plan: Plan) -> str:
    """What a node takes of the whole model's memory; empty where the plan does not say. Facts are free."""
    found = []
    for node in plan.nodes:
        memory = node.facts.get("memory")
        total = memory.get("total") if isinstance(memory, dict) else None
        if not isinstance(total, (int, float)):
            return ""
        found.append(total)
    whole = plan.extra.get(WHOLE_MEMORY)
    sizes = _span([_size(total) for total in found])
    if not isinstance(whole, (int, float)) or whole <= 0:
        return f"{sizes} of memory"
    return (
        f"{sizes} of memory, {_span([percent(total / whole) for total in found])} of the whole model's {_size(whole)}"
    )


def _span(words: list[str]) -> str:
    """Write the first and last of sorted words, or the one that all are."""
    different = list(dict.fromkeys(words))
    return different[0] if len(different) == 1 else listed(different, 4)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / _GIB:.1f} GiB" if n_bytes >= _GIB else f"{n_bytes / 2**20:.1f} MiB"


def _change(ratio: float) -> str:
    """Write what a ratio of perplexities changes: ``+16%``; a large one as ``5.2 times as high``."""
    return f"{100 * (ratio - 1):+.0f}%" if ratio < 3 else f"{ratio:.1f} times as high"


def _lost(scores: Scores) -> str:
    low, high = scores.ratio_ci
    text = f"perplexity {_change(scores.ratio)} (95% interval: {_interval((low, high))})"
    if low <= 1 <= high:
        text += ", no difference that this much text could show"
    if scores.agreement is not None:
        text += f"; for {percent(scores.agreement.top1)} of tokens the likeliest one is the whole model's"
    return text


def _interval(ratios: Interval) -> str:
    return f"{_change(ratios[0])} to {_change(ratios[1])}"


def _loops(evaluation: Evaluation) -> str:
    found = evaluation.loops
    if found is None:
        return ""
    apart = found.placed.ci[0] > found.full.ci[1]
    much = "more than" if apart else "not measurably more than"
    return (
        f"{percent(found.placed.rate)} of {counted(found.placed.n, 'answer')} end in loops, {much} the whole model's "
        f"{percent(found.full.rate)}."
    )


def _of_curve(curve: Curve) -> str:
    """The best strategy's loss with about half of the experts."""

    def distance(point: Point) -> float:
        return abs(point.keep / curve.model.n_expert - 0.5)

    points = {name: min(own, key=distance) for name, own in curve.strategies.items()}
    name = min(points, key=lambda other: (distance(points[other]), points[other].scores.excess))
    point = points[name]
    share = percent(point.keep / curve.model.n_expert)
    return (
        f"One node with {share} of the experts ({point.keep} of {curve.model.n_expert} per layer, chosen by {name}): "
        f"{_lost(point.scores)}."
    )
