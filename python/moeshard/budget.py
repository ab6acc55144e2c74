"""How much memory a node needs, and how many experts fit into a node's memory: by llama.cpp's own allocations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeshard import _core
from moeshard._core import GGUFMap, MoeshardError


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

    n_ctx: int = 4096
    """Tokens that each sequence can hold."""
    n_seq: int = 1
    """Sequences at once."""
    n_ubatch: int = 512
    """Tokens computed at once."""


def shard_memory(model: GGUFMap, n_keep: int, use: Use, n_expert_used: int | None = None) -> Memory:
    """Return what a shard of `n_keep` experts per layer would take. Nothing is allocated for it.

    Raises MoeshardError where the model has no such shard.
    """
    layout = model.moe_layout()
    keep = np.zeros((layout.n_layer, layout.n_expert), dtype=bool)
    # Which experts makes no difference, but expert groups have to hold equally many.
    groups = max(1, layout.n_expert_groups)
    size = layout.n_expert // groups
    for group in range(groups):
        keep[:, group * size : group * size + n_keep // groups] = True
    segments = _core.shard_segments(model, keep, n_expert_used=n_expert_used or 0, clamp=True)[0]
    native = _core.Model(model.path, segments, simulate=True)
    context = _core.Context(native, n_ctx=use.n_ctx, n_seq_max=use.n_seq, n_ubatch=use.n_ubatch, n_threads=1)
    return Memory(*context.memory)


def largest_keep(budget: int, fewest: int, most: int, step: int, memory: Callable[[int], Memory]) -> int:
    """Return the largest number of experts, from `fewest` to `most` in steps, that fits into `budget` bytes.

    Raises MoeshardError where not even the fewest fit; it says what takes how much.
    """
    least = memory(fewest)
    if least.total > budget:
        raise MoeshardError(
            f"{budget} bytes are too few for any shard: with {fewest} experts per layer, the fewest that a token can "
            f"do with, weights take {least.weights}, the context {least.context} and intermediate results "
            f"{least.compute}; give the node more memory, a shorter context or fewer sequences"
        )
    low, high = 0, (most - fewest) // step
    while low < high:
        middle = (low + high + 1) // 2
        if memory(fewest + middle * step).total <= budget:
            low = middle
        else:
            high = middle - 1
    return fewest + low * step
