"""What a layer's output loses when several experts are dropped: more than each alone says.

A token's *contribution* of an expert is its weight times the norm of the expert's output. With the outputs of a token's
experts pointing about the same way, what the token misses of its layer is the sum of the contributions of those experts
that were dropped, and to second order its loss grows with the square of that (Optimal Brain Damage, LeCun, Denker and
Solla 1989). Summed over tokens the square is a quadratic form in the experts dropped, whose matrix are the sums of
products of contributions that a profile holds. An expert is then worth most where it serves tokens that would lose
their other experts too: it is better that each token keeps some of its experts than that some keep all, others none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Doubles, Floats, Ints, Rows
from moeshard.profile.record import Profile

_TINY = float(np.finfo(np.float32).tiny)
_ROUNDING = 1e-9
"""Exchanges that gain less than this part of a layer's own squares are not made: they might go round in circles."""


@dataclass(frozen=True, eq=False)
class Contributions:
    """S sequences' contributions in M layers, each sequence scaled so that losing all experts loses 1 / M per layer.

    Of each domain they are held in units of the root of its own squares, an expert's in a layer. The sequences of a
    domain stand together, domains in their order.
    """

    spans: list[slice]
    """Where the sequences of each domain are."""
    roots: Floats
    """float32 (M, S, E): square roots of the summed squares of each expert's contributions."""
    pairs: Floats
    """float32 (D, M, E, E): the products of two experts' contributions in the tokens of each domain."""
    beside: Floats
    """float32 (M, S, E): products of each expert with all experts together."""

    def lost(self, keep: Rows) -> Doubles:
        """Return float64 (S,): the share of the squared contributions that a node with these rows (M, E) loses."""
        lost = np.zeros(self.roots.shape[1])
        for pairs, span in zip(self.pairs, self.spans, strict=True):
            for row, kept in enumerate(keep):
                roots = self.roots[row, span]
                dropped = np.flatnonzero(~kept)
                if 2 * dropped.size <= kept.size:
                    lost[span] += _form(roots, pairs[row], dropped)
                else:  # all that the kept ones do not hold, alone or with a dropped one
                    beside = self.beside[row, span]
                    held = np.einsum("se,se->s", roots, beside * (1 - 2 * kept.astype(np.float32)))
                    lost[span] += held + _form(roots, pairs[row], np.flatnonzero(kept))
        return np.maximum(lost, 0)

    def products(self, weights: Doubles) -> Floats:
        """Return float32 (M, E, E): sums of products of contributions over sequences weighted by (S,)."""
        products = np.zeros(self.pairs.shape[1:], dtype=np.float32)
        self.add_products(weights, products)
        return products

    def add_products(self, weights: Doubles, products: Floats) -> None:
        """Add them to `products`."""
        for pairs, span in zip(self.pairs, self.spans, strict=True):
            own = span.start + np.flatnonzero(weights[span] > 0)
            if not own.size:
                continue
            scale = np.sqrt(weights[own]).astype(np.float32)[:, None]
            for row in range(len(products)):
                roots = self.roots[row, own] * scale
                products[row] += pairs[row] * (roots.T @ roots)


def _form(roots: Floats, pairs: Floats, experts: Ints) -> Floats:
    """float32 (S,): the quadratic form of some experts."""
    own = roots[:, experts]
    form: Floats = np.einsum("se,se->s", own @ pairs[np.ix_(experts, experts)], own)
    return form


def contributions(profile: Profile, sequences: Ints) -> Contributions:
    """Return the contributions of some sequences (indices) of a profile, which stand in the order of their domains.

    Which experts contribute to the same tokens is kept per domain only; how much each contributes, per sequence.
    """
    domain = profile.domain[sequences]
    roots = np.sqrt(np.asarray(profile.energy[sequences])).transpose(1, 0, 2)
    units = domain_units(profile)
    roots = np.stack([own / units[domain, row] for row, own in enumerate(roots)])
    return scaled(roots, profile.cosaliency, domain_spans(domain, len(profile.domains)))


def domain_units(profile: Profile) -> Floats:
    """Return float32 (D, M, E): the units of `Contributions`; 1 of experts that contributed nothing."""
    squares = np.einsum("dmee->dme", profile.cosaliency)
    units: Floats = np.sqrt(np.where(squares > 0, squares, np.float32(1)))
    return units


def domain_spans(domain: npt.NDArray[np.integer[Any]], n_domains: int) -> list[slice]:
    """Return where each domain's sequences are; they stand in the order of their domains, `domain` (S,)."""
    ends = np.searchsorted(domain, np.arange(n_domains + 1)).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def scaled(roots: Floats, pairs: Floats, spans: Sequence[slice]) -> Contributions:
    """Return the contributions whose roots, of whatever size, these are; changes `roots`."""
    beside = np.empty_like(roots)
    for own, span in zip(pairs, spans, strict=True):
        if span.start < span.stop:
            np.matmul(roots[:, span], own, out=beside[:, span])
    for row, (own, products) in enumerate(zip(roots, beside, strict=True)):
        whole = np.einsum("se,se->s", own, products)
        factor = 1 / np.sqrt(np.maximum(whole * len(roots), _TINY))[:, None]
        roots[row] *= factor
        beside[row] *= factor
    return Contributions(list(spans), roots, pairs, beside)


def least_lost(products: Floats, size: int, protected: Rows, fewest: int | None = None) -> Rows:
    """Return bool (M, E): experts to keep so that little is lost of the squared contributions.

    One after the other the expert is dropped that costs least beside those dropped before; then single experts are
    exchanged within a layer as long as that helps.

    Args:
        products: float (M, E, E): of `Contributions.products`.
        size: experts to keep per layer.
        protected: bool (M, E): experts that are never dropped.
        fewest: layers may keep different numbers, at least so many, and `size` on average; None: equally many each.
    """
    own = np.einsum("mee->me", products).astype(np.float64)
    n_layer, n_expert = own.shape
    forbidden = np.where(_strongest(own, protected, size), np.inf, 0.0)
    dropped = np.zeros(own.shape, dtype=bool)
    beside = np.zeros(own.shape)  # products with all experts that were dropped
    rows = np.arange(n_layer)
    order = np.empty((n_expert - (size if fewest is None else fewest), n_layer), dtype=np.int64)
    costs = np.empty(order.shape)
    for step in range(len(order)):
        cost = np.where(dropped, np.inf, 2 * beside + own + forbidden)
        order[step] = cost.argmin(axis=1)
        costs[step] = cost[rows, order[step]]
        dropped[rows, order[step]] = True
        beside += products[rows, order[step]]
    if fewest is not None:
        dropped = _cheapest(order, costs, (n_expert - size) * n_layer, n_expert)
    for layer in range(n_layer):
        _exchange(products[layer], dropped[layer], protected[layer])
    return ~dropped


def _cheapest(order: Ints, costs: Doubles, n_dropped: int, n_expert: int) -> Rows:
    """bool (M, E): so many experts of all layers, each layer's in the order in which it would drop them.

    What a layer drops next depends on that layer alone and costs no less than what it dropped before (costs are made
    not to fall where rounding would let them): to take the next cheapest, again and again, is to take the cheapest.
    """
    rising = np.maximum.accumulate(costs, axis=0).T
    taken = np.zeros(rising.shape, dtype=bool)
    taken.reshape(-1)[np.argsort(rising, axis=None, kind="stable")[:n_dropped]] = True
    dropped = np.zeros((len(rising), n_expert), dtype=bool)
    rows, steps = np.nonzero(taken)
    dropped[rows, order[steps, rows]] = True
    return dropped


def _strongest(own: Doubles, protected: Rows, most: int) -> Rows:
    """The protected experts; where these are more than a layer may keep, the strongest of them."""
    rank = np.argsort(np.argsort(-np.where(protected, own, -1.0), axis=1, kind="stable"), axis=1)
    strongest: Rows = protected & (rank < most)
    return strongest


def _exchange(products: Floats, dropped: npt.NDArray[np.bool_], protected: npt.NDArray[np.bool_]) -> None:
    """Exchange single experts of one layer, the most useful exchange first; changes `dropped` (E,)."""
    own = np.diag(products).astype(np.float64)
    beside = products.sum(axis=1, where=dropped, dtype=np.float64)
    for _ in range(dropped.size):
        out, kept = np.flatnonzero(dropped), np.flatnonzero(~dropped & ~protected)
        if not out.size or not kept.size:
            return
        change = (own - 2 * beside)[out][:, None] + (own + 2 * beside)[kept] - 2 * products[np.ix_(out, kept)]
        back, gone = divmod(int(change.argmin()), kept.size)
        if change[back, gone] >= -_ROUNDING * own.sum():
            return
        dropped[out[back]], dropped[kept[gone]] = False, True
        beside += products[kept[gone]]
        beside -= products[out[back]]
