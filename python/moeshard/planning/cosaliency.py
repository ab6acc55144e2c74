"""What a layer's output loses when several experts are dropped: more than each alone says.

A token's *contribution* of an expert is its weight times the norm of the expert's output. With the outputs of a token's
experts pointing about the same way, what the token misses of its layer is the sum of the contributions of those experts
that were dropped, and to second order its loss grows with the square of that (Optimal Brain Damage, LeCun, Denker and
Solla 1989). Summed over tokens the square is a quadratic form in the experts dropped, whose matrix are the sums of
products of contributions that a profile holds. An expert is then worth most where it serves tokens that would lose
their other experts too: it is better that each token keeps some of its experts than that some keep all, others none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Doubles, Floats, Ints, Rows
from moeshard.profile.record import Profile

_TINY = float(np.finfo(np.float32).tiny)
_ROUNDING = 1e-9
"""Exchanges that gain less than this part of a layer's own squares are not made: they might go round in circles."""


@dataclass(frozen=True, eq=False)
class Contributions:
    """S sequences' contributions in M layers, each sequence scaled so that losing all experts loses 1 / M per layer."""

    domain: Ints
    """int (S,)."""
    roots: Floats
    """float32 (S, M, E): square roots of the summed squares of each expert's contributions."""
    correlation: Floats
    """float32 (D, M, E, E): of the contributions of two experts, 0 to 1, in the tokens of each domain."""

    def lost(self, keep: Rows) -> Doubles:
        """Return float64 (S,): the share of the squared contributions that a node with these rows (M, E) loses."""
        lost = np.zeros(self.domain.size)
        dropped = self.roots * ~keep
        for domain, correlation in enumerate(self.correlation):
            own = np.flatnonzero(self.domain == domain)
            for row, pairs in enumerate(correlation):
                part = dropped[own, row]
                lost[own] += np.einsum("se,se->s", part @ pairs, part)
        return lost

    def products(self, weights: Doubles) -> Doubles:
        """Return float64 (M, E, E): sums of products of contributions over sequences weighted by (S,)."""
        products = np.zeros(self.correlation.shape[1:])
        for domain, correlation in enumerate(self.correlation):
            own = np.flatnonzero((self.domain == domain) & (weights > 0))
            for row, pairs in enumerate(correlation):
                roots = self.roots[own, row]
                products[row] += pairs * ((roots * weights[own, None].astype(np.float32)).T @ roots)
        return products


def contributions(profile: Profile, sequences: Ints) -> Contributions:
    """Return the contributions of some sequences (indices) of a profile.

    Which experts contribute to the same tokens is kept per domain only; how much each contributes, per sequence.
    """
    scale = np.sqrt(np.maximum(np.einsum("dmee->dme", profile.cosaliency), _TINY))
    correlation = profile.cosaliency / scale[:, :, :, None]
    correlation /= scale[:, :, None, :]
    roots = np.sqrt(profile.energy[sequences])
    domain = profile.domain[sequences].astype(np.int64)
    raw = Contributions(domain, roots, correlation)
    for row in range(profile.layers.size):
        layer = Contributions(domain, roots[:, row : row + 1], correlation[:, row : row + 1])
        whole = layer.lost(np.zeros((1, profile.n_expert), dtype=bool))
        roots[:, row] /= np.sqrt(np.maximum(whole * profile.layers.size, _TINY))[:, None]
    return raw


def least_lost(products: Doubles, size: int, protected: Rows, fewest: int | None = None) -> Rows:
    """Return bool (M, E): experts to keep so that little is lost of the squared contributions.

    One after the other the expert is dropped that costs least beside those dropped before; then single experts are
    exchanged within a layer as long as that helps.

    Args:
        products: float64 (M, E, E): of `Contributions.products`.
        size: experts to keep per layer.
        protected: bool (M, E): experts that are never dropped.
        fewest: layers may keep different numbers, at least so many, and `size` on average; None: equally many each.
    """
    own = np.einsum("mee->me", products)
    forbidden = np.where(_strongest(own, protected, size), np.inf, 0.0)
    dropped = np.zeros(own.shape, dtype=bool)
    beside = np.zeros(own.shape)  # products with all experts that were dropped
    rows = np.arange(len(own))
    n_dropped = own.shape[1] - size
    for _ in range(n_dropped if fewest is None else n_dropped * len(own)):
        cost = np.where(dropped, np.inf, 2 * beside + own + forbidden)
        expert = cost.argmin(axis=1)
        row = rows
        if fewest is not None:
            cost[dropped.sum(axis=1) >= own.shape[1] - fewest] = np.inf
            row = cost.min(axis=1).argmin(keepdims=True)
        dropped[row, expert[row]] = True
        beside[row] += products[row, expert[row]]
    for layer in range(len(own)):
        _exchange(products[layer], dropped[layer], protected[layer])
    return ~dropped


def _strongest(own: Doubles, protected: Rows, most: int) -> Rows:
    """The protected experts; where these are more than a layer may keep, the strongest of them."""
    rank = np.argsort(np.argsort(-np.where(protected, own, -1.0), axis=1, kind="stable"), axis=1)
    strongest: Rows = protected & (rank < most)
    return strongest


def _exchange(products: Doubles, dropped: npt.NDArray[np.bool_], protected: npt.NDArray[np.bool_]) -> None:
    """Exchange single experts of one layer, the most useful exchange first; changes `dropped` (E,)."""
    own = np.diag(products)
    beside = products @ dropped
    for _ in range(dropped.size):
        out, kept = np.flatnonzero(dropped), np.flatnonzero(~dropped & ~protected)
        if not out.size or not kept.size:
            return
        change = (own - 2 * beside)[out][:, None] + (own + 2 * beside)[kept] - 2 * products[np.ix_(out, kept)]
        back, gone = divmod(int(change.argmin()), kept.size)
        if change[back, gone] >= -_ROUNDING * own.sum():
            return
        dropped[out[back]], dropped[kept[gone]] = False, True
        beside += products[kept[gone]] - products[out[back]]
