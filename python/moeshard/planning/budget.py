"""How much memory a node needs, and how many experts fit into a node's memory: by llama.cpp's own allocations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeLayout, MoeshardError
from moeshard.keep.text import Keep
from moeshard.runtime.limits import DEFAULT_CTX
from moeshard.sizes import size


@dataclass(frozen=True)
class Memory:
    """Bytes that llama.cpp allocates, on all devices together."""

    weights: int
    context: int
    """Keys and values of attention, or other state, of all sequences."""
    compute: int
    """Intermediate results."""

    @property
    def total(self) -> int:
        return self.weights + self.context + self.compute


@dataclass(frozen=True)
class Use:
    """How a node is to be used; what its memory depends on besides its experts."""

    n_ctx: int = DEFAULT_CTX
    """Tokens that each sequence can hold."""
    n_seq: int = 1
    """Sequences at once."""
    n_ubatch: int = 512
    """Tokens computed at once."""


def default_ctx(model: GGUFMap) -> int:
    """Return how many tokens of context a model is run with unless told otherwise, as `moeshard.Model` counts."""
    trained = model.metadata.get(f"{model.moe_layout().arch}.context_length")
    return min(trained, DEFAULT_CTX) if isinstance(trained, int) and trained > 0 else DEFAULT_CTX


def shard_memory(model: GGUFMap, keep: int | Keep, use: Use, n_expert_used: int | None = None) -> Memory:
    """Return what the shard of a keep, or of so many experts per layer, would take. Nothing is allocated for it.

    Raises MoeshardError where the model has no such shard.
    """
    held = _equal_keep(model.moe_layout(), keep) if isinstance(keep, int) else keep
    segments = _core.shard_segments(model, held, n_expert_used=n_expert_used or 0, clamp=True, per_layer=True)[0]
    native = _core.Model(model.path, segments, simulate=True)
    context = _core.Context(native, n_ctx=use.n_ctx, n_seq_max=use.n_seq, n_ubatch=use.n_ubatch, n_threads=1)
    return Memory(*context.memory)


def _equal_keep(layout: MoeLayout, n_keep: int) -> Keep:
    """Which experts makes no difference to memory, but expert groups have to hold equally many."""
    keep = np.zeros((layout.n_layer, layout.n_expert), dtype=bool)
    groups = max(1, layout.n_expert_groups)
    size = layout.n_expert // groups
    for group in range(groups):
        keep[:, group * size : group * size + n_keep // groups] = True
    return keep


def largest_keep(budget: int, fewest: int, most: int, step: int, memory: Callable[[int], Memory]) -> int:
    """Return the largest number of experts, from `fewest` to `most` in steps, that fits into `budget` bytes.

    Raises MoeshardError where not even the fewest fit; it says what takes how much.
    """
    least = memory(fewest)
    if least.total > budget:
        raise MoeshardError(
            f"{size(budget)} are too few for any shard: with {fewest} experts per layer, the fewest that a token can "
            f"do with, weights take {size(least.weights)}, the context {size(least.context)} and intermediate results "
            f"{size(least.compute)}, together {size(least.total)}; give the node more memory, a shorter context or "
            f"fewer sequences"
        )
    low, high = 0, (most - fewest) // step
    while low < high:
        middle = (low + high + 1) // 2
        if memory(fewest + middle * step).total <= budget:
            low = middle
        else:
            high = middle - 1
    return fewest + low * step


def fit(
    sizes: Sequence[int],
    budgets: Sequence[int] | None,
    fewest: int,
    expert_bytes: int,
    choose: Callable[[Sequence[int]], list[Keep]],
    memory: Callable[[Keep], Memory],
) -> tuple[list[int], list[Keep], list[Memory]]:
    """Choose the experts of nodes whose layers hold different numbers of them, so that each node's memory suffices.

    In many files the experts of some layers are larger than those of others, so memory follows from the choice.

    Args:
        sizes: experts per layer of each node, on average, that fit where all layers hold equally many.
        budgets: bytes of memory of each node; None: not to be looked at.
        fewest: experts that each layer holds at least; so many in every layer fit.
        expert_bytes: of one expert in every layer.
        choose: from sizes to what the nodes hold.
        memory: of a node.

    Returns:
        The sizes, smaller where the choice would not fit; the choice; and its memory.
    """
    sizes = list(sizes)
    while True:
        keeps = choose(sizes)
        memories = [memory(keep) for keep in keeps]
        if budgets is None:
            return sizes, keeps, memories
        excess = [used.total - budget for used, budget in zip(memories, budgets, strict=True)]
        if max(excess) <= 0:
            return sizes, keeps, memories
        for node, bytes_over in enumerate(excess):
            if bytes_over > 0:
                sizes[node] = max(fewest, sizes[node] - max(1, bytes_over // expert_bytes))
