"""Dealing the experts of every layer out to nodes or groups.

A group has one count of experts for all layers, because stock llama.cpp reads one ``expert_count`` per file; and in a
model with grouped routing (DeepSeek-V3: consecutive experts form routing groups) one count for all routing groups,
because the router assumes that they are equally large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeshard._core import MoeshardError
from moeshard.arrays import Doubles, Ints
from moeshard.keep.text import Keep
from moeshard.profile.ranking import Ranking

MODES = ("contiguous", "balanced", "tiers", "snake")

_NEEDS_RANKING = ("tiers", "snake")
_FORMER = {"ranked": "tiers"}
"""Names that mean something else by now."""
NOBODY = -1
_EVERY_GROUP = -2


def group_experts(
    mode: str,
    n_groups: int,
    n_layer: int,
    n_expert: int,
    moe_layers: Sequence[int],
    *,
    ranking: Ranking | None = None,
    replicate: int = 0,
    expert_groups: int = 1,
) -> list[Keep]:
    """Divide the experts of every layer among groups. The same arguments always give the same groups.

    Args:
        mode: how the experts of a layer are dealt:
            ``contiguous``: ranges of ids;
            ``balanced``: heaviest first, each to the group with the least score so far that has room for it, so that
            all groups carry about the same; without a ranking as ``contiguous``, which is equal bytes;
            ``tiers``: by descending score, cut into pieces: group 0 holds the best experts, the last group the rest;
            ``snake``: by descending score, dealt to groups 0, 1, …, G-1, G-1, …, 1, 0, 0, 1, ….
            Equal scores are taken in the order of ids.
        n_groups: how many.
        n_layer, n_expert: of the model.
        moe_layers: the layers that route.
        ranking: of the same model. A MoE layer without scores is dealt ``contiguous``.
        replicate: how many of each layer's best experts are in every group; the others are dealt by the mode.
        expert_groups: how many routing groups the model has (0 or 1: its routing is not grouped). Every routing group
            is dealt for itself, `replicate` included.

    Returns:
        A keep, bool ``(n_layer, n_expert)``, for each group. Every expert of a MoE layer is in exactly one of them, or
        in all if it is replicated. A group holds equally many experts of every MoE layer and routing group; where they
        cannot be divided evenly, some groups hold one more of each routing group: the first ones (``snake``: those
        that the last round reaches). Rows of other layers are True.

    Raises:
        MoeshardError: saying which argument does not fit the model or the mode, and what would.
    """
    routing_groups = max(expert_groups, 1)
    _check(mode, n_groups, n_layer, n_expert, moe_layers, ranking, replicate, routing_groups)
    keeps = [np.ones((n_layer, n_expert), dtype=np.bool_) for _ in range(n_groups)]
    for layer in moe_layers:
        scores = None if ranking is None or not ranking.scored[layer] else ranking.scores[layer]
        owners = _deal_layer(mode, n_groups, n_expert, scores, replicate // routing_groups, routing_groups)
        for group, keep in enumerate(keeps):
            keep[layer] = (owners == group) | (owners == _EVERY_GROUP)
    return keeps


def _deal_layer(
    mode: str, n_groups: int, n_expert: int, scores: Doubles | None, replicate: int, routing_groups: int
) -> Ints:
    """Return the group of each expert of a layer; `replicate` is per routing group."""
    owners = np.full(n_expert, _EVERY_GROUP, dtype=np.int64)
    # Over all routing groups, so that what one leaves uneven the next evens out.
    loads = np.zeros(n_groups)
    for experts in np.split(np.arange(n_expert), routing_groups):
        room = _even_room(mode, n_groups, experts.size - replicate)
        if scores is None:  # any experts are as good as others
            dealt = experts[replicate:]
            owners[dealt] = deal_row("contiguous", dealt, np.zeros(n_expert), room)
            continue
        # Descending, stable: numpy sorts ascending.
        dealt = experts[np.argsort(-scores[experts], kind="stable")][replicate:]
        owners[dealt] = deal_row(mode, dealt, scores, room, loads)
    return owners


def deal_row(mode: str, order: Ints, scores: Doubles, room: Sequence[int], loads: Doubles | None = None) -> Ints:
    """Deal some experts of one layer out to nodes: what `split --mode` and `plan --strategy` of one name both do.

    Args:
        mode: one of `MODES`.
        order: int (n,), expert ids, best first.
        scores: float64 (n_expert,) by expert id.
        room: how many experts each node takes. Where there is less room than experts the last are dealt to nobody,
            where there is more it stays empty.
        loads: float64 (n_nodes,), for ``balanced``: what each node carries already; it is added to. None: nothing.

    Returns:
        int64 (n,): the node of each expert of `order`, -1 for nobody.
    """
    owners = np.full(order.size, NOBODY, dtype=np.int64)
    if mode == "balanced":
        _balance(owners, order, scores, np.array(room), np.zeros(len(room)) if loads is None else loads)
        return owners
    turns = snake_turns(room) if mode == "snake" else np.repeat(np.arange(len(room)), room)
    count = min(order.size, turns.size)
    by_turn = np.argsort(order, kind="stable") if mode == "contiguous" else np.arange(order.size)
    owners[by_turn[:count]] = turns[:count]
    return owners


def snake_turns(room: Sequence[int]) -> Ints:
    """Return int64 (sum(room),): whose turn it is in a snake draft in which node i picks ``room[i]`` times."""
    left = list(room)
    turns: list[int] = []
    forward = True
    while any(left):
        for node in range(len(left)) if forward else range(len(left) - 1, -1, -1):
            if left[node]:
                turns.append(node)
                left[node] -= 1
        forward = not forward
    return np.array(turns, dtype=np.int64)


def _even_room(mode: str, n_groups: int, count: int) -> list[int]:
    """Divide `count` experts evenly; it depends on nothing that differs by layer."""
    rounds, rest = divmod(count, n_groups)
    # Of a snake draft, odd rounds go backwards.
    last = range(n_groups - 1, n_groups - 1 - rest, -1) if mode == "snake" and rounds % 2 else range(rest)
    return [rounds + (group in last) for group in range(n_groups)]


def _balance(owners: Ints, order: Ints, scores: Doubles, room: Ints, loads: Doubles) -> None:
    """Give each expert, heaviest first, to the node with the least load that has room.

    With equal rooms no two nodes' loads then differ by more than the largest score: an expert goes to a node either
    because that node has the least, or because the other is full, of experts that are all at least as heavy.
    """
    for index, expert in enumerate(order):
        with_room = np.flatnonzero(room)
        if not with_room.size:
            return
        node = with_room[np.argmin(loads[with_room])]
        owners[index] = node
        loads[node] += scores[expert]
        room[node] -= 1


def _check(
    mode: str,
    n_groups: int,
    n_layer: int,
    n_expert: int,
    moe_layers: Sequence[int],
    ranking: Ranking | None,
    replicate: int,
    routing_groups: int,
) -> None:
    if mode in _FORMER:
        raise MoeshardError(
            f"mode '{mode}' is called '{_FORMER[mode]}' now: '{mode}' is the strategy of moeshard plan, which puts the "
            f"same best experts on every node"
        )
    if mode not in MODES:
        raise MoeshardError(f"unknown mode '{mode}'; the modes are {', '.join(MODES)}")
    if n_expert < 1 or not moe_layers:
        raise MoeshardError("this model is dense: it has no experts that could be divided into groups")
    if n_expert % routing_groups:
        raise MoeshardError(f"{n_expert} experts cannot form {routing_groups} equal routing groups")
    per_routing_group = n_expert // routing_groups
    if not 1 <= n_groups <= per_routing_group:
        of_what = "" if routing_groups == 1 else f" in each of its {routing_groups} routing groups"
        raise MoeshardError(
            f"cannot make {n_groups} groups: the model has {per_routing_group} experts per layer{of_what}; ask for 1 "
            f"to {per_routing_group} groups"
        )
    if ranking is None and mode in _NEEDS_RANKING:
        raise MoeshardError(f"mode '{mode}' needs to know which experts are best; give a ranking with --ranking FILE")
    if ranking is None and replicate:
        raise MoeshardError(
            "replicating the best experts needs to know which they are; give a ranking with --ranking FILE"
        )
    if ranking is not None and ranking.scores.shape != (n_layer, n_expert):
        raise MoeshardError(
            f"{ranking.source}: ranks {ranking.scores.shape[1]} experts in {ranking.scores.shape[0]} layers, but the "
            f"model has {n_expert} in {n_layer}; give a ranking of this model"
        )
    if not 0 <= replicate <= n_expert:
        raise MoeshardError(f"cannot replicate {replicate} experts of {n_expert} per layer; write 0 to {n_expert}")
    if replicate % routing_groups:
        nearest = replicate // routing_groups * routing_groups
        raise MoeshardError(
            f"cannot replicate {replicate} experts: every one of the model's {routing_groups} routing groups must give "
            f"as many; write {nearest} or {nearest + routing_groups}"
        )
