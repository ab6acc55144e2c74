"""Random keeps and bit-exact comparison."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keep = npt.NDArray[np.bool_]


def random_keep(rng: np.random.Generator, n_layer: int, n_expert: int, n_used: int, n_group: int = 1) -> Keep:
    """Return a keep whose rows differ, with between `n_used` and all but one of the experts, at least 2 per group."""
    keep = np.zeros((n_layer, n_expert), dtype=bool)
    groups = np.arange(n_expert).reshape(max(n_group, 1), -1)
    for row in keep:
        n_keep = int(rng.integers(n_used, n_expert))
        if n_group > 1:
            for group in groups:
                row[rng.choice(group, 2, replace=False)] = True
        missing = max(n_keep - int(row.sum()), 0)
        row[rng.choice(np.flatnonzero(~row), missing, replace=False)] = True
    return keep


def random_partition(
    rng: np.random.Generator, n_layer: int, n_expert: int, n_shards: int, n_group: int = 1
) -> npt.NDArray[np.bool_]:
    """Deal the experts of every layer out to `n_shards` keeps, equally many to each: (n_shards, n_layer, n_expert).

    Of expert groups a keep gets equal parts: of all of them or, where that would be a single expert each, of some. (A
    group is scored by its best two.)
    """
    size = n_expert // n_group
    n_sets = 1
    while n_group > 1 and size * n_sets // n_shards < 2:
        n_sets *= 2
    shards_per_set = n_shards // n_sets
    keeps = np.zeros((n_shards, n_layer, n_expert), dtype=bool)
    for layer in range(n_layer):
        for i, groups in enumerate(rng.permutation(n_group).reshape(n_sets, -1)):
            for group in groups:
                hands = rng.permutation(size).reshape(shards_per_set, -1) + group * size
                for j, hand in enumerate(hands):
                    keeps[i * shards_per_set + j, layer, hand] = True
    return keeps


def same_bits(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a.view(np.int32) == b.view(np.int32)).all())


def assert_same_bits(ours: npt.NDArray[np.float32], stock: npt.NDArray[np.float32], what: str) -> None:
    """Say by how much and from which token on two arrays (n_tokens, …) differ."""
    assert ours.shape == stock.shape, f"{what}: shape {ours.shape}, stock {stock.shape}"
    if same_bits(ours, stock):
        return
    rows = np.flatnonzero((ours.view(np.int32) != stock.view(np.int32)).reshape(len(ours), -1).any(axis=1))
    largest = np.nanmax(np.abs(ours - stock))
    raise AssertionError(f"{what}: {len(rows)} of {len(ours)} rows differ, first {rows[0]}, by up to {largest:.3g}")


def assert_alike(
    ours: npt.NDArray[np.float32],
    theirs: npt.NDArray[np.float32],
    our_ids: npt.NDArray[np.int32],
    their_ids: npt.NDArray[np.int32],
    tolerance: float,
    *,
    causal: bool = True,
) -> None:
    """Compare logits (n_tokens, …) that were rounded otherwise, of their largest, as far as tokens went to the same
    experts (layer, token, slot).

    Rounding tips a near-tie of a router now and then, on each processor another one: then another expert computes.
    """
    other = (np.sort(our_ids, axis=-1) != np.sort(their_ids, axis=-1)).any(axis=(0, 2))
    assert other.mean() < 0.1, f"{other.sum()} of {other.size} tokens went to other experts"
    same = ~np.logical_or.accumulate(other) if causal else np.full(other.shape, not other.any())
    difference = float(np.abs(ours - theirs)[same].max(initial=0) / np.abs(theirs).max())
    assert difference <= tolerance, f"{difference:.2g} apart, of the largest logit"


def largest_difference(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Return max |a - b| relative to the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())
