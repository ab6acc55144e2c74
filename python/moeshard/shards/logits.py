"""Whether a shard computes what the whole model does under the shard's keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeLayout, SegmentList, ShardFacts
from moeshard.arrays import Floats
from moeshard.keep.text import Keep
from moeshard.runtime.model import Model
from moeshard.runtime.origin import Origin
from moeshard.shards.agreement import Comparison, Routers, allowed_gap, compare, judge, limit
from moeshard.shards.jitter import jittered
from moeshard.shards.runs import Probe, Run, nothing_to_choose, random_tokens, run


@dataclass(frozen=True)
class LogitCheck:
    """A shard beside the whole model under its keep, on the same tokens, twice: as they are, and each sequence under a
    part of the keep that leaves the routers no choice."""

    n_tokens: int
    n_choices: int
    """Tokens times layers whose experts were compared: of each sequence up to the first choice that differs."""
    n_different: int
    """Choices that differ."""
    largest_gap: float
    """How far apart the scores were that were swapped there, relative to their size."""
    allowed_gap: float
    """For the token of the largest gap: what rounding may swap."""
    n_compared: int
    """Tokens whose logits were compared: where all choices agree, and where there is none."""
    largest_difference: float
    """Of the largest absolute logit; 0: all is the same, bit for bit."""
    allowed: float
    """What rounding may do to logits; 0 where it was not measured, since all is the same."""
    same_choice: float
    """Share of the compared tokens for which both find the same next token likeliest."""
    problem: str | None
    """What is more than rounding."""

    @property
    def agrees(self) -> bool:
        return self.problem is None


def compare_logits(
    file: GGUFMap, source: GGUFMap, facts: ShardFacts, one_file: SegmentList, n_threads: int
) -> LogitCheck:
    """Run the shard, and the whole model under the shard's keep, on the same pseudo-random tokens.

    Where they differ, the shard is compared with itself too, its numbers changed a little: that is what rounding does.

    Args:
        file: the shard.
        source: the whole model.
        facts: what the shard says about itself.
        one_file: the shard as it would be written in one file.
        n_threads: 0 for as many as the processors this process may use.
    """
    layout = source.moe_layout()
    routers = Routers(layout, selection_biases(source, layout))
    shard = Model(file.path, n_threads=n_threads)
    probes = make_probes(shard, np.array(facts.keep), layout)
    ours = [run(shard, probe) for probe in probes]
    del shard
    whole = whole_model(file, source, n_threads)
    found = _compare_all([run(whole, probe) for probe in probes], ours, routers)
    del whole
    rounding: list[Comparison] = []
    if not all(comparison.exact for comparison in found):
        changed = Model(Origin(file.path, jittered(one_file), np.array(facts.keep)), n_threads=n_threads)
        rounding = _compare_all(ours, [run(changed, probe) for probe in probes], routers)
    return summary(found, rounding)


def make_probes(shard: Model, keep: Keep, layout: MoeLayout) -> list[Probe]:
    """Return the tokens under the shard's keep and, where expert groups allow it, under parts of it."""
    tokens = random_tokens(shard)
    narrow = nothing_to_choose(keep, layout, shard.routing.n_expert_used)
    keeps = [np.repeat(keep[None], len(tokens), axis=0), *([] if narrow is None else [narrow])]
    return [Probe(tokens, each) for each in keeps]


def summary(found: list[Comparison], rounding: list[Comparison]) -> LogitCheck:
    """Judge comparisons with the masked model, one per probe, by comparisons of runs that differ by rounding."""
    swaps = [swap for comparison in found for swap in comparison.swaps]
    largest = max(swaps, key=lambda swap: swap.gap, default=None)
    n_compared = sum(comparison.n_compared for comparison in found)
    logits = [comparison.logits.largest for comparison in found if comparison.logits]
    problem = None
    if any(not comparison.exact for comparison in found):
        problem = next((why for comparison in found if (why := judge(comparison, rounding))), None)
    if n_compared == 0:
        problem = problem or "no sequence has the same experts in all layers, so that no logits could be compared"
    return LogitCheck(
        n_tokens=sum(comparison.n_tokens for comparison in found),
        n_choices=sum(comparison.n_choices for comparison in found),
        n_different=len(swaps),
        largest_gap=largest.gap if largest else 0.0,
        allowed_gap=allowed_gap(largest, rounding) if largest else 0.0,
        n_compared=n_compared,
        largest_difference=max(logits, default=0.0),
        allowed=limit([other.logits.largest for other in rounding if other.logits]) if rounding else 0.0,
        same_choice=sum(comparison.same_likeliest for comparison in found) / max(n_compared, 1),
        problem=problem,
    )


def _compare_all(runs: list[Run], others: list[Run], routers: Routers) -> list[Comparison]:
    return [compare(run, other, routers) for run, other in zip(runs, others, strict=True)]


def selection_biases(source: GGUFMap, layout: MoeLayout) -> dict[int, Floats]:
    """Return the biases that a model adds to scores before it chooses, float32 (n_expert,) by layer."""
    biases = {}
    for tensor in layout.tensors:
        name = source.tensor_infos[tensor.index].name
        if name == f"blk.{tensor.layer}.exp_probs_b.bias":
            biases[tensor.layer] = np.array(source.tensors[name], dtype=np.float32)
    return biases


def whole_model(file: GGUFMap, source: GGUFMap, n_threads: int) -> Model:
    """Load the model, with as many experts per token as the shard uses.

    Where layers use different numbers, llama.cpp takes them from a header only: the model is then read into memory
    behind a header with the shard's numbers.
    """
    key = f"{file.moe_layout().arch}.expert_used_count"
    if f"moeshard.source.{key}" not in file.metadata:
        return Model(source.path, n_threads=n_threads)
    used = file.metadata[key]
    if np.ndim(used) == 0:
        return Model(source.path, n_threads=n_threads, n_expert_used=int(used))
    layout = source.moe_layout()
    (whole,) = _core.shard_segments(source, np.ones((layout.n_layer, layout.n_expert), dtype=bool))
    at = whole.entry_range(key)
    assert at is not None
    offset, size = file.parts[0].entry_ranges[key]
    renumbered = whole.with_bytes([(at[0], file.parts[0].read(offset, size))])
    return Model(Origin(source.path, renumbered, None), n_threads=n_threads)
