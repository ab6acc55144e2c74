"""Fewer sequences that stand for many: those of a domain that use about the same experts are taken as one.

A search that looks at every sequence again and again need not look at thousands that hardly differ. Sequences are told
apart by the square roots of each expert's share of their squared contributions, since losses are quadratic forms of
these, thrown at random onto a few dimensions, which leaves distances about as they are (Johnson, Lindenstrauss 1984),
and grouped by k-means within each domain. What stands for a group has the mean squares of its sequences, by weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeshard.arrays import Doubles, Floats, Ints, Rows
from moeshard.planning.cosaliency import Contributions, contributions, domain_spans, domain_units, scaled
from moeshard.profile.record import Profile

_DIMENSIONS = 64
_ROUNDS = 10
_BLOCK = 256
"""Sequences that are looked at at once."""


@dataclass(frozen=True, eq=False)
class Condensed:
    """G groups of sequences of a profile."""

    parts: Contributions
    """Of what stands for each group."""
    weights: Doubles
    """float64 (G,): sums of the sequences' own."""
    group: Ints
    """int (S,): of each sequence that was given."""


def condense(profile: Profile, sequences: Ints, weights: Doubles, most: int) -> Condensed:
    """Group sequences (indices, in the order of their domains) that count by `weights` (S,), into at most about `most`.

    Where there are no more than that, each is a group of its own.
    """
    if sequences.size <= most:
        each = np.arange(sequences.size, dtype=np.int64)
        return Condensed(contributions(profile, sequences), weights, each)
    group = _grouped(profile, sequences, weights, most)
    n_groups = int(group.max()) + 1
    n_layer = profile.layers.size
    sums = np.zeros((n_layer, n_groups, profile.n_expert), dtype=np.float32)
    for at, parts in _blocks(profile, sequences):
        squares = np.square(parts.roots) * weights[at].astype(np.float32)[:, None]
        for index, own in enumerate(group[at]):
            sums[:, own] += squares[:, index]
    whole = np.bincount(group, weights, n_groups).astype(np.float64)
    sums /= np.maximum(whole, np.finfo(np.float64).tiny).astype(np.float32)[:, None]
    domain = np.zeros(n_groups, dtype=np.int64)
    domain[group] = profile.domain[sequences]
    spans = domain_spans(domain, len(profile.domains))
    return Condensed(scaled(np.sqrt(sums, out=sums), profile.cosaliency, spans), whole, group)


def losses(profile: Profile, sequences: Ints, keeps: list[Rows]) -> Doubles:
    """Return float64 (S, nodes): what each node loses of each of some sequences, looked at a few at a time."""
    lost = np.empty((sequences.size, len(keeps)))
    for at, parts in _blocks(profile, sequences):
        for node, keep in enumerate(keeps):
            lost[at, node] = parts.lost(keep)
    return lost


def products(profile: Profile, sequences: Ints, weights: Doubles, owner: Ints, n_nodes: int) -> Floats:
    """Return float32 (nodes, M, E, E): sums of products over each node's sequences; `weights` and `owner` are (S,)."""
    n_layer, n_expert = profile.layers.size, profile.n_expert
    found = np.zeros((n_nodes, n_layer, n_expert, n_expert), dtype=np.float32)
    for at, parts in _blocks(profile, sequences):
        for node in np.unique(owner[at]):
            parts.add_products(np.where(owner[at] == node, weights[at], 0), found[node])
    return found


def _blocks(profile: Profile, sequences: Ints) -> Iterator[tuple[slice, Contributions]]:
    """Some sequences at a time, those of a block of one domain."""
    for span in domain_spans(profile.domain[sequences], len(profile.domains)):
        for at in range(span.start, span.stop, _BLOCK):
            block = slice(at, min(at + _BLOCK, span.stop))
            yield block, contributions(profile, sequences[block])


def _grouped(profile: Profile, sequences: Ints, weights: Doubles, most: int) -> Ints:
    """int (S,): groups, numbered in the order of domains."""
    rng = np.random.default_rng(0)
    onto = rng.choice(np.array([-1, 1], dtype=np.float32), (profile.layers.size, profile.n_expert, _DIMENSIONS))
    points = np.empty((sequences.size, _DIMENSIONS), dtype=np.float32)
    units = domain_units(profile)
    domain = profile.domain[sequences]
    for at, parts in _blocks(profile, sequences):
        roots = parts.roots * units[domain[at.start]][:, None, :]
        points[at] = np.matmul(roots, onto).sum(axis=0)
    group = np.empty(sequences.size, dtype=np.int64)
    first = 0
    for index in np.unique(domain):
        own = np.flatnonzero(domain == index)
        found = _k_means(points[own], weights[own], max(1, most * own.size // sequences.size), rng)
        group[own] = found + first
        first += int(found.max()) + 1
    return group


def _k_means(points: Floats, weights: Doubles, k: int, rng: np.random.Generator) -> Ints:
    """int (n,): about k groups, from points drawn as k-means++ does (Arthur and Vassilvitskii 2007)."""
    centres = points[first_centres(points, weights, k, rng, np.arange(len(points)))]
    nearest = np.empty(0, dtype=np.int64)
    for _ in range(_ROUNDS):
        distance = (centres**2).sum(axis=1) - 2 * (points @ centres.T)
        nearest = distance.argmin(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points * weights[:, None].astype(np.float32))
        share = np.bincount(nearest, weights, len(centres))
        centres[share > 0] = (sums / np.maximum(share, 1e-30)[:, None])[share > 0]
    numbers: Ints = np.unique(nearest, return_inverse=True)[1]
    return numbers


def first_centres(points: Floats, weights: Doubles, k: int, rng: np.random.Generator, order: Ints) -> list[int]:
    """Return k indices of points far from each other, drawn by weight times squared distance to the nearest before.

    `order` are all indices as they stand where points are drawn.
    """
    squares = (points**2).sum(axis=1, dtype=np.float64)

    def distances(centre: int) -> Doubles:
        found: Doubles = np.maximum(squares + squares[centre] - 2 * (points @ points[centre]), 0)
        return found

    even = weights[order] / weights.sum()
    centres = [int(rng.choice(order, p=even))]
    nearest = distances(centres[0])
    while len(centres) < k:
        chance = (nearest * weights)[order]
        total = chance.sum()
        centres.append(int(rng.choice(order, p=chance / total if total > 0 else even)))
        nearest = np.minimum(nearest, distances(centres[-1]))
    return centres
