"""The strategy `islands`: each node becomes good at some of the traffic, and sessions go where they are served best.

Alternates between giving each sequence of the profile to the node that loses least of it, and choosing each node's
experts for its sequences, like k-means with what is lost in place of distances. Experts that all sequences need end up
on every node by themselves. What is lost are squared contributions, see `moeshard.planning.cosaliency`; the first
rounds go by the sums of each expert's own squares, which is quick, and only the best beginnings are followed to their
end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moeshard.arrays import Doubles, Floats, Ints, Rows
from moeshard.planning.cosaliency import Contributions, contributions, least_lost
from moeshard.planning.strategies import across_layers, best
from moeshard.profile.record import Profile
from moeshard.profile.statistics import super_experts

ROUNDS = 40
FOLLOWED = 4
"""Of so many beginnings one is followed to its end."""


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
    """The sequences that were measured."""

    parts: Contributions
    shares: Floats
    """float32 (S, M * E): each expert's own squares as a share of the layer's, 1 / M in each layer."""
    weights: Doubles
    """float64 (S,): what each sequence counts; domains count alike and sum to 1 together."""
    protected: Rows


def islands(
    profile: Profile,
    sizes: Sequence[int],
    *,
    restarts: int = 16,
    shrinkage: float = 0.1,
    cover: bool = False,
    seed: int = 0,
    fewest: int | None = None,
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

    Returns:
        The nodes in the order of `sizes`.
    """
    measured = np.flatnonzero(profile.n_tokens > 0)
    traffic = _Traffic(
        contributions(profile, measured),
        _shares(profile)[measured],
        _weights(profile)[measured],
        super_experts(profile),
    )
    by_squares = _by_squares(traffic, sizes, shrinkage, fewest)
    by_products = _by_products(traffic, sizes, shrinkage, fewest)
    rng = np.random.default_rng(seed)
    beginnings = []
    for index in range(max(1, restarts)):
        keeps, owner = _alternate(_first_owners(traffic, len(sizes), rng), by_squares)
        beginnings.append((_lost(traffic, keeps), index, owner))
    found: tuple[float, list[Rows], Ints] | None = None
    for _, _, owner in sorted(beginnings)[: -(-len(beginnings) // FOLLOWED)]:
        keeps, owner = _alternate(owner, by_products)
        if cover:
            keeps = _cover(keeps, traffic, owner)
        lost = _lost(traffic, keeps)
        if found is None or lost < found[0]:
            found = lost, keeps, owner
    assert found is not None
    owners = np.full(profile.n_tokens.size, -1)
    owners[measured] = found[2]
    return Islands(found[1], owners, found[0])


def _shares(profile: Profile) -> Floats:
    sums = profile.energy.sum(axis=2, keepdims=True)
    shares: Floats = profile.energy / np.maximum(sums, np.finfo(np.float32).tiny) / profile.layers.size
    return shares.reshape(shares.shape[0], -1)


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
"""From the node of each sequence to the experts of each node, and what each node then loses of each sequence (S, G)."""


def _by_squares(traffic: _Traffic, sizes: Sequence[int], shrinkage: float, fewest: int | None) -> _Step:
    """Experts of most squares, as if no two contributed to the same token."""
    choose = best if fewest is None else partial(across_layers, fewest=fewest)

    def step(owner: Ints) -> tuple[list[Rows], Doubles]:
        keeps = []
        for own, size in zip(_pull(traffic, owner, len(sizes), shrinkage), sizes, strict=True):
            keeps.append(choose(own @ traffic.shares, size, traffic.protected))
        held = np.stack([keep.ravel() for keep in keeps], axis=1).astype(np.float32)
        return keeps, 1 - (traffic.shares @ held).astype(np.float64)

    return step


def _by_products(traffic: _Traffic, sizes: Sequence[int], shrinkage: float, fewest: int | None) -> _Step:
    """Experts without which least is lost, by who contributes to the same tokens."""

    def step(owner: Ints) -> tuple[list[Rows], Doubles]:
        keeps = [
            least_lost(traffic.parts.products(own), size, traffic.protected, fewest)
            for own, size in zip(_pull(traffic, owner, len(sizes), shrinkage), sizes, strict=True)
        ]
        return keeps, _losses(traffic, keeps)

    return step


def _pull(traffic: _Traffic, owner: Ints, n_nodes: int, shrinkage: float) -> Doubles:
    """float64 (G, S): how much each sequence says in each node's choice; rows sum to 1."""
    pull = np.empty((n_nodes, owner.size))
    for node in range(n_nodes):
        own = np.where(owner == node, traffic.weights, 0)
        weight = own.sum()
        own = own / weight if weight > 0 else traffic.weights
        pull[node] = (1 - shrinkage) * own + shrinkage * traffic.weights
    return pull


def _alternate(owner: Ints, step: _Step) -> tuple[list[Rows], Ints]:
    """Alternate until no sequence moves."""
    keeps: list[Rows] = []
    for _ in range(ROUNDS):
        keeps, lost = step(owner)
        new: Ints = lost.argmin(axis=1)
        # A node that nobody wants begins anew with the sequence that is served worst.
        for node in range(len(keeps)):
            if not (new == node).any():
                new[lost.min(axis=1).argmax()] = node
        if np.array_equal(new, owner):
            break
        owner = new
    return keeps, owner


def _losses(traffic: _Traffic, keeps: Sequence[Rows]) -> Doubles:
    """float64 (S, G): the share of each sequence's squared contributions that each node loses."""
    return np.stack([traffic.parts.lost(keep) for keep in keeps], axis=1)


def _lost(traffic: _Traffic, keeps: Sequence[Rows]) -> float:
    return float(_losses(traffic, keeps).min(axis=1) @ traffic.weights)


def _first_owners(traffic: _Traffic, n_nodes: int, rng: np.random.Generator) -> Ints:
    """As k-means++ (Arthur and Vassilvitskii 2007): centres far from each other, each sequence to its nearest."""
    shares, weights = traffic.shares, traffic.weights
    centres = [int(rng.choice(len(shares), p=weights))]
    distance = ((shares - shares[centres[0]]) ** 2).sum(axis=1)
    nearest = distance.copy()
    owner = np.zeros(len(shares), dtype=np.int64)
    for node in range(1, n_nodes):
        chance = nearest * weights
        total = chance.sum()
        centre = int(rng.choice(len(shares), p=chance / total if total > 0 else weights))
        distance = ((shares - shares[centre]) ** 2).sum(axis=1)
        owner[distance < nearest] = node
        nearest = np.minimum(nearest, distance)
    return owner


def _cover(keeps: list[Rows], traffic: _Traffic, owner: Ints) -> list[Rows]:
    """Give every expert a home, by taking the places of those that are on several nodes and matter least there."""
    protected = traffic.protected
    shape = protected.shape
    wanted = [((owner == node) * traffic.weights) @ traffic.shares for node in range(len(keeps))]
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
