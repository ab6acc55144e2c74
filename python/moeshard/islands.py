"""The strategy `islands`: each node becomes good at some of the traffic, and sessions go where they are served best.

Alternates between giving each sequence of the profile to the node that serves it best, and choosing each node's experts
by saliency on its sequences, like k-means with the captured saliency in place of distances. Experts that all sequences
need end up on every node by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeshard.choosing import Chooser, Rows
from moeshard.profile import Profile
from moeshard.strategies import best, super_experts

Floats = npt.NDArray[np.float32]

ROUNDS = 40


@dataclass(frozen=True)
class Islands:
    """What the search found."""

    keeps: list[Rows]
    """Per node: bool (M, E)."""
    owner: npt.NDArray[np.int64]
    """int (S,): the node of each sequence of the profile, -1 for one that was not measured."""
    captured: float
    """Mean over sequences of the share of saliency that its node holds, 0 to 1; domains count alike."""


def islands(
    profile: Profile,
    sizes: Sequence[int],
    *,
    restarts: int = 16,
    shrinkage: float = 0.2,
    cover: bool = False,
    seed: int = 0,
    choose: Chooser = best,
) -> Islands:
    """Search for nodes that together serve the traffic of a profile best.

    Args:
        profile: the traffic.
        sizes: experts per layer of each node.
        restarts: from so many random beginnings; the best is taken.
        shrinkage: share by which a node is drawn toward what all traffic needs: few sequences say little.
        cover: every expert lives on some node (where the nodes have room for all).
        seed: of the beginnings; the same seed gives the same nodes.
        choose: how a node's experts follow from scores.

    Returns:
        The nodes in the order of `sizes`.
    """
    measured = np.flatnonzero(profile.n_tokens > 0)
    shares = _shares(profile)[measured]
    weights = _weights(profile)[measured]
    protected = super_experts(profile)
    rng = np.random.default_rng(seed)
    found: Islands | None = None
    for _ in range(max(1, restarts)):
        keeps, owner = _search(shares, weights, sizes, shrinkage, protected, rng, choose)
        if cover:
            keeps = _cover(keeps, shares, weights, owner, protected)
        score = float((_captured(shares, keeps).max(axis=1) * weights).sum())
        if found is None or score > found.captured:
            owners = np.full(profile.n_tokens.size, -1)
            owners[measured] = owner
            found = Islands([keep.reshape(profile.layers.size, profile.n_expert) for keep in keeps], owners, score)
    assert found is not None
    return found


def _shares(profile: Profile) -> Floats:
    """float32 (S, M * E): of each sequence, each expert's share of the saliency; each layer has 1/M of it."""
    sums = profile.saliency.sum(axis=2, keepdims=True)
    shares: Floats = profile.saliency / np.maximum(sums, np.finfo(np.float32).tiny) / profile.layers.size
    return shares.reshape(shares.shape[0], -1)


def _weights(profile: Profile) -> npt.NDArray[np.float64]:
    """float64 (S,): what each sequence counts; domains count alike and sum to 1 together."""
    weights = np.zeros(profile.n_tokens.size)
    for index in range(len(profile.domains)):
        chosen = profile.domain == index
        tokens = profile.n_tokens[chosen].sum()
        if tokens:
            weights[chosen] = profile.n_tokens[chosen] / tokens
    total: float = weights.sum()
    return weights / total if total else weights


def _captured(shares: Floats, keeps: Sequence[Rows]) -> npt.NDArray[np.float64]:
    """float64 (S, G): the share of each sequence's saliency that each node holds."""
    held = np.stack([keep.ravel() for keep in keeps], axis=1).astype(np.float32)
    return (shares @ held).astype(np.float64)


def _search(
    shares: Floats,
    weights: npt.NDArray[np.float64],
    sizes: Sequence[int],
    shrinkage: float,
    protected: Rows,
    rng: np.random.Generator,
    choose: Chooser,
) -> tuple[list[Rows], npt.NDArray[np.int64]]:
    everything = weights @ shares
    owner = _first_owners(shares, weights, len(sizes), rng)
    keeps: list[Rows] = []
    for _ in range(ROUNDS):
        keeps = []
        for node, size in enumerate(sizes):
            mine = owner == node
            weight = weights[mine].sum()
            own = weights[mine] @ shares[mine] / weight if weight > 0 else everything
            keeps.append(choose((1 - shrinkage) * own + shrinkage * everything, size, protected))
        captured = _captured(shares, keeps)
        new = captured.argmax(axis=1)
        # A node that nobody wants begins anew with the sequence that is served worst.
        for node in range(len(sizes)):
            if not (new == node).any():
                new[captured.max(axis=1).argmin()] = node
        if np.array_equal(new, owner):
            break
        owner = new
    return keeps, owner


def _first_owners(
    shares: Floats, weights: npt.NDArray[np.float64], n_nodes: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """As k-means++ (Arthur and Vassilvitskii 2007): centres far from each other, each sequence to its nearest."""
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


def _cover(
    keeps: list[Rows], shares: Floats, weights: npt.NDArray[np.float64], owner: npt.NDArray[np.int64], protected: Rows
) -> list[Rows]:
    """Give every expert a home, by taking the places of those that are on several nodes and matter least there."""
    shape = protected.shape
    wanted = [((owner == node) * weights) @ shares for node in range(len(keeps))]
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
