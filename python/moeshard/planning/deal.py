"""Dealing the experts of every layer out to groups, so that together the groups hold each of them.

A group has one count of experts for all layers, because stock llama.cpp reads one ``expert_count`` per file; and in a
model with grouped routing (DeepSeek-V3: consecutive experts form routing groups) one count for all routing groups,
because the router assumes that they are equally large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.keep.text import Keep
from moeshard.profile.ranking import Ranking, Scores

MODES = ("contiguous", "balanced", "ranked", "snake")

_NEEDS_RANKING = ("ranked", "snake")
_EVERY_GROUP = -1

_Ints = npt.NDArray[np.intp]


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
            ``ranked``: by descending score, cut into pieces: group 0 holds the best experts, the last group the rest;
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
    mode: str, n_groups: int, n_expert: int, scores: Scores | None, replicate: int, routing_groups: int
) -> _Ints:
    """Return the group of each expert of a layer; `replicate` is per routing group."""
    owners = np.full(n_expert, _EVERY_GROUP, dtype=np.intp)
    # Over all routing groups, so that what one leaves uneven the next evens out.
    loads = np.zeros(n_groups)
    for experts in np.split(np.arange(n_expert), routing_groups):
        # Descending, stable: numpy sorts ascending. Without scores any experts are as good as others.
        order = experts if scores is None else experts[np.argsort(-scores[experts], kind="stable")]
        dealt = order[replicate:]
        draft = _draft(mode, n_groups, dealt.size)
        if scores is None or mode == "contiguous":
            owners[np.sort(dealt)] = np.sort(draft)
        elif mode == "balanced":
            _balance(owners, dealt, scores, loads, np.bincount(draft, minlength=n_groups))
        else:
            owners[dealt] = draft
    return owners


def _draft(mode: str, n_groups: int, count: int) -> _Ints:
    """Return the group of the first, second, … of `count` experts; it depends on nothing that differs by layer."""
    turns = np.arange(count) % n_groups
    if mode == "snake":
        backwards = np.arange(count) // n_groups % 2 == 1
        return np.where(backwards, n_groups - 1 - turns, turns)
    return np.sort(turns)


def _balance(owners: _Ints, order: _Ints, scores: Scores, loads: Scores, room: _Ints) -> None:
    """Give each expert, heaviest first, to the group with the least load that has room.

    With equal rooms no two groups' loads then differ by more than the largest score: an expert goes to a group either
    because that group has the least, or because the other is full, of experts that are all at least as heavy.
    """
    for expert in order:
        with_room = np.flatnonzero(room)
        group = with_room[np.argmin(loads[with_room])]
        owners[expert] = group
        loads[group] += scores[expert]
        room[group] -= 1


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
