"""Strategies: from a profile to what each of several nodes holds. Pure functions; no model is needed.

Each returns one bool array (M, E) per node, over the layers of the profile. Unless it says otherwise a node holds
``sizes[i]`` experts in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Doubles, Rows
from moeshard.planning.deal import deal_row
from moeshard.profile.record import Profile


class Chooser(Protocol):
    """Chooses a node's experts by scores (M, E): `size` in each layer, or on average; protected ones first."""

    def __call__(self, scores: Doubles, size: int, protected: Rows | None = None) -> Rows: ...


def across_layers(scores: Doubles, size: int, protected: Rows | None = None, *, fewest: int = 1) -> Rows:
    """Return bool (M, E): `size` experts per layer on average, more of them in layers that need more.

    Every layer holds its `fewest` best. All other places go, over all layers, to the experts with the largest share of
    their layer's score: no other choice of as many experts captures a larger sum of shares. Of equal shares, those of
    lower layers and ids come first.

    Args:
        scores: float (M, E), or flat, where `protected` gives the shape.
        size: experts per layer; M times as many are held.
        protected: bool (M, E): experts that come before all others.
        fewest: experts that each layer holds at least: as many as a token uses.
    """
    rows = scores if protected is None else scores.reshape(protected.shape)
    shares = rows / np.maximum(rows.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    if protected is not None:
        shares = np.where(protected, np.inf, shares)
    keep = np.zeros(shares.shape, dtype=bool)
    np.put_along_axis(keep, np.argsort(-shares, axis=1, kind="stable")[:, :fewest], True, axis=1)
    open_places = size * len(shares) - int(keep.sum())
    rest = np.where(keep, -np.inf, shares).ravel()
    keep.reshape(-1)[np.argsort(-rest, kind="stable")[:open_places]] = True
    return keep


def best(scores: Doubles, size: int, protected: Rows | None = None) -> Rows:
    """Return bool (M, E): the `size` experts of highest score in each row, lower ids first among equals.

    `protected` ones, bool (M, E), come before all others, those of highest score first.
    """
    if protected is not None:
        rows = scores.reshape(protected.shape)
        scores = rows + np.where(protected, 1 + np.ptp(rows, axis=1, keepdims=True), 0)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :size]
    keep = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(keep, order, True, axis=1)
    return keep


def contiguous(profile: Profile, sizes: Sequence[int]) -> list[Rows]:
    """Ranges of ids: one after the other where together they are all experts, else as far from each other as fits."""
    rows, n_expert = profile.layers.size, profile.n_expert
    keeps = []
    gaps = max(1, len(sizes) - 1)
    for index, size in enumerate(sizes):
        first = round((sum(sizes[:index]) * gaps + index * (n_expert - sum(sizes))) / gaps)
        first = min(max(first, 0), n_expert - size)
        keep = np.zeros((rows, n_expert), dtype=bool)
        keep[:, first : first + size] = True
        keeps.append(keep)
    return keeps


def ranked(profile: Profile, sizes: Sequence[int], choose: Chooser = best) -> list[Rows]:
    """The same best experts by saliency on every node."""
    return [choose(profile.total("saliency"), size) for size in sizes]


def reap(profile: Profile, sizes: Sequence[int], choose: Chooser = best) -> list[Rows]:
    """The same best experts by their mean contribution where chosen (REAP, arXiv 2510.13999) on every node."""
    return [choose(profile.scores("reap"), size) for size in sizes]


def snake(profile: Profile, sizes: Sequence[int]) -> list[Rows]:
    """A snake draft over the mass: 0, 1, …, G-1, G-1, …, 0, 0, …

    Where the nodes hold more than all experts together the best ones are on every node; where they hold fewer the worst
    are on none.
    """
    return _dealt("snake", profile.total("mass"), sizes, _own_sizes(sizes, profile.n_expert))


def balanced(profile: Profile, sizes: Sequence[int]) -> list[Rows]:
    """About equal mass on every node: heaviest first, to the node with least that has room."""
    return _dealt("balanced", profile.total("mass"), sizes, _own_sizes(sizes, profile.n_expert))


def shared_core(profile: Profile, sizes: Sequence[int], core: float = 0.5) -> list[Rows]:
    """The hottest experts (a share `core` of the smallest node) everywhere, the rest dealt out by a snake draft."""
    shared = round(core * min(sizes))
    return _dealt("snake", profile.total("mass"), sizes, [size - shared for size in sizes])


def coactivation(profile: Profile, sizes: Sequence[int]) -> list[Rows]:
    """Experts that are chosen together live together: spectral clustering into clusters of the nodes' own sizes.

    Shared experts, where the nodes have room for them, are those of highest saliency.

    Raises MoeshardError where scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MoeshardError("strategy 'coactivation' needs scipy: pip install 'moeshard[plan]'") from error
    scores = profile.total("saliency")
    own = _own_sizes(sizes, profile.n_expert)
    together = profile.together.sum(axis=0, dtype=np.float64)
    keeps = [best(scores, size - n) for size, n in zip(sizes, own, strict=True)]
    slots = np.repeat(np.arange(len(sizes)), own)
    for row in range(profile.layers.size):
        shared = np.logical_and.reduce([keep[row] for keep in keeps])
        rest = np.flatnonzero(~shared)
        if not rest.size:
            continue  # every node holds everything
        points = _spectral(together[row][np.ix_(rest, rest)], len(sizes))
        centres = points[np.linspace(0, len(rest) - 1, len(sizes)).astype(int)].copy()
        owner = np.full(len(rest), -1)
        for _ in range(30):
            cost = ((points[:, None] - centres[None]) ** 2).sum(axis=2)[:, slots]
            experts, places = linear_sum_assignment(cost)
            new = np.full(len(rest), -1)
            new[experts] = slots[places]
            if np.array_equal(new, owner):
                break
            owner = new
            for node in range(len(sizes)):
                if (owner == node).any():
                    centres[node] = points[owner == node].mean(axis=0)
        for node, keep in enumerate(keeps):
            keep[row, rest[owner == node]] = True
        _fill(keeps, row, scores[row], sizes)
    return keeps


def _spectral(weights: Doubles, n_clusters: int) -> Doubles:
    """Points whose distances follow the graph's normalised Laplacian (Ng, Jordan and Weiss 2001)."""
    weights = weights.copy()
    np.fill_diagonal(weights, 0)
    degree = np.maximum(weights.sum(axis=1), 1e-12)
    scaled = weights / np.sqrt(degree[:, None] * degree[None])
    _, vectors = np.linalg.eigh(scaled)
    points = vectors[:, -n_clusters:]
    rows: Doubles = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return rows


def _own_sizes(sizes: Sequence[int], n_expert: int) -> list[int]:
    """Of each node: how many of its experts are on no other, where all others are on every node."""
    n_nodes = len(sizes)
    if n_nodes == 1:
        return list(sizes)
    spare = sum(sizes) - n_expert
    shared = min(max(0, spare) // (n_nodes - 1), min(sizes))
    return [size - shared for size in sizes]


def _dealt(mode: str, scores: Doubles, sizes: Sequence[int], own: Sequence[int]) -> list[Rows]:
    """Deal experts out; of each node's, all but ``own[i]`` are the best of the layer, which every node holds."""
    keeps = [best(scores, size - n) for size, n in zip(sizes, own, strict=True)]
    core = np.logical_and.reduce(keeps)
    for row, values in enumerate(scores):
        order = np.argsort(-values, kind="stable")
        order = order[~core[row, order]]
        owners = deal_row(mode, order, values, own)
        for node, keep in enumerate(keeps):
            keep[row, order[owners == node]] = True
        _fill(keeps, row, values, sizes)
    return keeps


def _fill(keeps: list[Rows], row: int, values: npt.NDArray[np.float64], sizes: Sequence[int]) -> None:
    """Give nodes that still have room, because all experts were dealt, the best that they lack."""
    for keep, size in zip(keeps, sizes, strict=True):
        missing = size - int(keep[row].sum())
        if missing > 0:
            order = np.argsort(np.where(keep[row], np.inf, -values), kind="stable")
            keep[row, order[:missing]] = True


Strategy = Callable[[Profile, Sequence[int]], list[Rows]]

STRATEGIES: dict[str, Strategy] = {
    "contiguous": contiguous,
    "balanced": balanced,
    "ranked": ranked,
    "snake": snake,
    "reap": reap,
    "coactivation": coactivation,
}
"""Those without options."""

CHOOSING: dict[str, Callable[[Profile, Sequence[int], Chooser], list[Rows]]] = {"ranked": ranked, "reap": reap}
"""Of them, those that a chooser for layers of different size can be given to."""
