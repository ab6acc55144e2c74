"""The strategy `islands`: each node becomes good at some of the traffic, and sessions go where they are served best.

Alternates between giving each sequence of the profile to the node that loses least of it, and choosing each node's
experts for its sequences, like k-means with what is lost in place of distances. Experts that all sequences need end up
on every node by themselves. What is lost are squared contributions, see `moeshard.planning.cosaliency`; the first
rounds go by the sums of each expert's own squares, which is quick, and only the best beginnings are followed to their
end. Of many sequences, those that are nearly the same are looked at as one, see `moeshard.planning.condensed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from moeshard.arrays import Doubles, Floats, Ints, Rows
from moeshard.planning.condensed import Condensed, condense, first_centres, losses, products
from moeshard.planning.cosaliency import domain_units, least_lost
from moeshard.planning.strategies import across_layers, best
from moeshard.profile.record import Profile
from moeshard.profile.statistics import super_experts

ROUNDS = 40
FOLLOWED = 4
"""Of so many beginnings one is followed to its end."""
SETTLED = 1e-3
"""Rounds end when sequences of less than this part of the traffic would move."""
GROUPS = 2048
"""So many sequences are looked at, each of which may stand for several, but in the last rounds."""


@dataclass(frozen=True)
class Islands:
    """What the search found."""

    keeps: list[Rows]
    """Per node: bool (M, E)."""
    owner: Ints
    """int (S,): the node of each sequence of the profile, -1 for one that was not measured."""
    lost: float
    """Mean over sequences of the share of squared contributions that its node loses, 0 to 1; domains count alike."""


@dataclass(frozen=True, eq=False)
class _Traffic:
    """The sequences that were measured, or groups of them."""

    groups: Condensed
    measured: Ints
    """int (n,): which sequences of the profile these are, in the order of their domains."""
    weights: Doubles
    """float64 (n,): what each sequence counts; domains count alike and sum to 1 together."""
    units: Floats
    """float32 (D, M, E): of each domain's contributions."""
    protected: Rows

    @property
    def is_condensed(self) -> bool:
        return self.groups.weights.size < self.measured.size


@dataclass(eq=False)
class Begun:
    """What a search leaves for another one in the same profile, of nodes of about the same sizes."""

    traffic: _Traffic | None = None
    owners: list[Ints] = field(default_factory=list)
    """What was found from each beginning that was followed to its end."""


def islands(
    profile: Profile,
    sizes: Sequence[int],
    *,
    restarts: int = 16,
    shrinkage: float = 0.1,
    cover: bool = False,
    seed: int = 0,
    fewest: int | None = None,
    begun: Begun | None = None,
) -> Islands:
    """Search for nodes that together serve the traffic of a profile best.

    Args:
        profile: the traffic.
        sizes: experts per layer of each node.
        restarts: from so many random beginnings; the best is taken.
        shrinkage: share by which a node is drawn toward what all traffic needs: few sequences say little.
        cover: every expert lives on some node (where the nodes have room for all).
        seed: of the beginnings; the same seed gives the same nodes.
        fewest: layers may hold different numbers of experts, at least so many each; `sizes` are then means over layers.
        begun: what an earlier search in this profile, with the same options, left: it is gone on with, and left for the
            next. A new one is filled.

    Returns:
        The nodes in the order of `sizes`.
    """
    begun = begun or Begun()
    traffic = begun.traffic = begun.traffic or _traffic(profile)
    if not begun.owners:
        begun.owners = _beginnings(traffic, sizes, shrinkage, fewest, restarts, seed)
    by_products = _by_products(traffic, sizes, shrinkage, fewest)
    found: tuple[float, list[Rows], Ints] | None = None
    for index, owner in enumerate(begun.owners):
        keeps, owner, lost = _alternate(owner, by_products, traffic.groups.weights)
        begun.owners[index] = owner
        if cover:
            keeps = _cover(keeps, traffic, owner)
            lost = _losses(traffic, keeps)
        mean = _mean(lost, traffic.groups.weights)
        if found is None or mean < found[0]:
            found = mean, keeps, owner
    assert found is not None
    mean, keeps, owner = found
    own = owner[traffic.groups.group]
    if traffic.is_condensed:  # the last rounds go by every sequence for itself
        by_all = _by_all(profile, traffic, sizes, shrinkage, fewest)
        keeps, own, lost = _alternate(own, by_all, traffic.weights)
        if cover:
            keeps = _cover(keeps, traffic, owner)
            lost = losses(profile, traffic.measured, keeps)
        own, mean = lost.argmin(axis=1), _mean(lost, traffic.weights)
    owners = np.full(profile.n_tokens.size, -1)
    owners[traffic.measured] = own
    return Islands(keeps, owners, mean)


def _by_all(profile: Profile, traffic: _Traffic, sizes: Sequence[int], shrinkage: float, fewest: int | None) -> _Step:
    """As `_by_products`, by every sequence instead of by groups."""

    def step(owner: Ints) -> tuple[list[Rows], Doubles]:
        sums = products(profile, traffic.measured, traffic.weights, owner, len(sizes))
        everywhere = sums.sum(axis=0)
        keeps = []
        for node, size in enumerate(sizes):
            weight = traffic.weights[owner == node].sum()
            own = everywhere if weight <= 0 else _drawn(sums[node], weight, everywhere, shrinkage)
            keeps.append(least_lost(own, size, traffic.protected, fewest))
        del sums, everywhere
        return keeps, losses(profile, traffic.measured, keeps)

    return step


def _drawn(own: Floats, weight: float, everywhere: Floats, shrinkage: float) -> Floats:
    """A node's products, by what its sequences weigh, drawn toward those of all traffic; changes `own`."""
    own *= np.float32((1 - shrinkage) / weight)
    own += np.float32(shrinkage) * everywhere
    return own


def _traffic(profile: Profile) -> _Traffic:
    measured = np.flatnonzero(profile.n_tokens > 0)
    measured = measured[np.argsort(profile.domain[measured], kind="stable")]
    weights = _weights(profile)[measured]
    groups = condense(profile, measured, weights, GROUPS)
    return _Traffic(groups, measured, weights, domain_units(profile), super_experts(profile))


def _shares(traffic: _Traffic) -> Floats:
    """float32 (G, M * E): each expert's own squares as a share of the layer's, 1 / M in each layer."""
    parts = traffic.groups.parts
    n_layer, n_groups, n_expert = parts.roots.shape
    shares = np.empty((n_groups, n_layer, n_expert), dtype=np.float32)
    for units, span in zip(traffic.units, parts.spans, strict=True):
        for row, own in enumerate(units):
            part = np.square(parts.roots[row, span] * own)
            shares[span, row] = part / np.maximum(part.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    shares /= n_layer
    return shares.reshape(n_groups, -1)


def _weights(profile: Profile) -> Doubles:
    weights = np.zeros(profile.n_tokens.size)
    for index in range(len(profile.domains)):
        chosen = profile.domain == index
        tokens = profile.n_tokens[chosen].sum()
        if tokens:
            weights[chosen] = profile.n_tokens[chosen] / tokens
    total: float = weights.sum()
    return weights / total if total else weights


_Step = Callable[[Ints], tuple[list[Rows], Doubles]]
"""From the node of each group to the experts of each node, and what each node then loses of each group, (G, nodes)."""


def _beginnings(
    traffic: _Traffic, sizes: Sequence[int], shrinkage: float, fewest: int | None, restarts: int, seed: int
) -> list[Ints]:
    """The best of random beginnings: which node has each group."""
    weights = traffic.groups.weights
    shares = _shares(traffic)
    step = _by_squares(traffic, shares, sizes, shrinkage, fewest)
    rng = np.random.default_rng(seed)
    # Sequences are drawn as they stand in the profile, which is what a seed has always meant.
    order = np.arange(weights.size) if traffic.is_condensed else np.argsort(traffic.measured)
    found = []
    for index in range(max(1, restarts)):
        keeps, owner, _ = _alternate(_first_owners(shares, weights, len(sizes), rng, order), step, weights)
        found.append((_mean(_losses(traffic, keeps), weights), index, owner))
    return [owner for _, _, owner in sorted(found)[: -(-len(found) // FOLLOWED)]]


def _by_squares(traffic: _Traffic, shares: Floats, sizes: Sequence[int], shrinkage: float, fewest: int | None) -> _Step:
    """Experts of most squares, as if no two contributed to the same token."""
    choose = best if fewest is None else partial(across_layers, fewest=fewest)
    weights = traffic.groups.weights

    def step(owner: Ints) -> tuple[list[Rows], Doubles]:
        keeps = []
        pull = np.stack([_pull(weights, owner == node, shrinkage) for node in range(len(sizes))])
        for wanted, size in zip((pull.astype(np.float32) @ shares).astype(np.float64), sizes, strict=True):
            keeps.append(choose(wanted, size, traffic.protected))
        held = np.stack([keep.ravel() for keep in keeps], axis=1).astype(np.float32)
        return keeps, 1 - (shares @ held).astype(np.float64)

    return step


def _by_products(traffic: _Traffic, sizes: Sequence[int], shrinkage: float, fewest: int | None) -> _Step:
    """Experts without which least is lost, by who contributes to the same tokens."""
    parts, weights = traffic.groups.parts, traffic.groups.weights
    everywhere = parts.products(weights)

    def wanted(own: Rows) -> Floats:
        weight = weights[own].sum()
        if weight <= 0:
            return everywhere
        return _drawn(parts.products(np.where(own, weights, 0)), weight, everywhere, shrinkage)

    def step(owner: Ints) -> tuple[list[Rows], Doubles]:
        keeps = [least_lost(wanted(owner == node), size, traffic.protected, fewest) for node, size in enumerate(sizes)]
        return keeps, _losses(traffic, keeps)

    return step


def _pull(weights: Doubles, own: Rows, shrinkage: float) -> Doubles:
    """float64 (G,): how much each group says in the choice of the node that has some of them; sums to 1."""
    weight = weights[own].sum()
    if weight <= 0:
        return weights
    pull: Doubles = (1 - shrinkage) / weight * np.where(own, weights, 0) + shrinkage * weights
    return pull


def _alternate(owner: Ints, step: _Step, weights: Doubles) -> tuple[list[Rows], Ints, Doubles]:
    """Alternate until next to nothing moves: the nodes, what they were chosen for, and what they lose of that."""
    keeps: list[Rows] = []
    lost = np.zeros(0)
    for _ in range(ROUNDS):
        keeps, lost = step(owner)
        new: Ints = lost.argmin(axis=1)
        # A node that nobody wants begins anew with the sequence that is served worst.
        for node in range(len(keeps)):
            if not (new == node).any():
                new[lost.min(axis=1).argmax()] = node
        if weights[new != owner].sum() < SETTLED:
            break
        owner = new
    return keeps, owner, lost


def _losses(traffic: _Traffic, keeps: Sequence[Rows]) -> Doubles:
    """float64 (G, nodes): the share of each group's squared contributions that each node loses."""
    return np.stack([traffic.groups.parts.lost(keep) for keep in keeps], axis=1)


def _mean(lost: Doubles, weights: Doubles) -> float:
    return float(lost.min(axis=1) @ weights)


def _first_owners(shares: Floats, weights: Doubles, n_nodes: int, rng: np.random.Generator, order: Ints) -> Ints:
    """As k-means++ does: centres far from each other, each group to its nearest."""
    centres = shares[first_centres(shares, weights, n_nodes, rng, order)]
    owner: Ints = ((centres**2).sum(axis=1) - 2 * (shares @ centres.T)).argmin(axis=1)
    return owner


def _cover(keeps: list[Rows], traffic: _Traffic, owner: Ints) -> list[Rows]:
    """Give every expert a home, by taking the places of those that are on several nodes and matter least there."""
    protected = traffic.protected
    shape = protected.shape
    owned = np.stack([(owner == node) * traffic.groups.weights for node in range(len(keeps))])
    wanted = owned.astype(np.float32) @ _shares(traffic)
    scores = [w.reshape(shape) / max(w.sum(), 1e-30) for w in wanted]
    out = [keep.copy() for keep in keeps]
    for row in range(shape[0]):
        for expert in np.flatnonzero(~np.logical_or.reduce([keep[row] for keep in out])):
            homes = np.sum([keep[row] for keep in out], axis=0)
            best_loss, place = np.inf, None
            for node, keep in enumerate(out):
                doubles = np.flatnonzero(keep[row] & (homes > 1) & ~protected[row])
                if not doubles.size:
                    continue
                least = doubles[scores[node][row, doubles].argmin()]
                loss = scores[node][row, least] - scores[node][row, expert]
                if loss < best_loss:
                    best_loss, place = loss, (node, int(least))
            if place is None:
                break
            node, least = place
            out[node][row, least] = False
            out[node][row, expert] = True
    return out
