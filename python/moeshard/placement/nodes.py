"""What computes as a node would: the whole model under the node's keep, or the node's shard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeshardError
from moeshard.gguf.fingerprint import same_fingerprint
from moeshard.gguf.identity import identify
from moeshard.keep.text import Keep, held_range
from moeshard.planning.plan import Plan, PlanNode
from moeshard.shards.split import TRUNK_FILE, recovery_name, shard_name

if TYPE_CHECKING:
    from moeshard.runtime.model import Model


@dataclass(frozen=True, eq=False)
class NodeModel:
    """A node that can be run."""

    model: Model
    """Several nodes may share one: their sequences are then computed in one batch."""
    keep: Keep | None
    """bool (n_layer, n_expert): the mask on it; None where the model is the node's shard."""


def masked_nodes(model: Model, keeps: Sequence[Keep], n_expert_used: Sequence[int | None] = ()) -> list[NodeModel]:
    """Return nodes that are masks on one model, with their own numbers of experts per token where these are given.

    For each other number the model's file is mapped once more, which takes no more memory.
    """
    models = {_same_everywhere(model): model, None: model}
    nodes = []
    for index, keep in enumerate(keeps):
        used = n_expert_used[index] if n_expert_used else None
        if used not in models:
            models[used] = model.sibling(n_expert_used=used)
        nodes.append(NodeModel(models[used], keep))
    return nodes


def by_model(model: Model, nodes: Sequence[NodeModel]) -> list[tuple[Model, list[tuple[int | None, Keep | None]]]]:
    """What runs on each model: indices of nodes with their masks, None for the whole model itself, which is first."""
    found: dict[int, tuple[Model, list[tuple[int | None, Keep | None]]]] = {id(model): (model, [(None, None)])}
    for index, node in enumerate(nodes):
        found.setdefault(id(node.model), (node.model, []))[1].append((index, node.keep))
    return list(found.values())


def plan_nodes(
    model: Model,
    plan: Plan,
    shards: str | os.PathLike[str] | None = None,
    *,
    recovery: str | os.PathLike[str] | None = None,
) -> list[NodeModel]:
    """Return a plan's nodes: as masks on its model, as the shards in a folder, or as shards without files.

    Args:
        model: the whole model that the plan is for.
        plan: a plan of it.
        shards: where `moeshard.split` wrote the plan's shards, whole or with one trunk.
        recovery: where `moeshard.recover` wrote the plan's recoveries: each node is loaded as its corrected shard.

    Raises:
        MoeshardError: the plan is for another model, or a shard or recovery is missing or not what the plan says of its
            node.
    """
    if shards is not None and recovery is not None:
        raise MoeshardError("give shards or a recovery: shards that were split with a recovery hold it already")
    plan.check(identify(GGUFMap(model.path)))
    if not model.is_whole:
        raise MoeshardError(f"{model.path}: only some of its experts are loaded; load the whole model")
    if recovery is not None:
        paths = recoveries(model, plan, recovery)
        return [_corrected(model, node, path) for node, path in zip(plan.nodes, paths, strict=True)]
    if shards is None:
        return masked_nodes(model, [node.keep for node in plan.nodes], [node.n_expert_used for node in plan.nodes])
    return [_open_shard(model, plan, node, os.fspath(shards)) for node in plan.nodes]


def _same_everywhere(model: Model) -> int | None:
    """Experts per token, if they are as many in all layers that route."""
    numbers = {model.routing.n_expert_used[layer] for layer in model.moe_layers}
    return numbers.pop() if len(numbers) == 1 else None


def recoveries(model: Model, plan: Plan, folder: str | os.PathLike[str]) -> list[str]:
    """Return where the recoveries of a plan's nodes lie.

    Raises:
        MoeshardError: one is missing.
    """
    paths = [os.path.join(folder, recovery_name(model.path, node.name)) for node in plan.nodes]
    for node, path in zip(plan.nodes, paths, strict=True):
        if not os.path.isfile(path):
            raise MoeshardError(
                f"'{os.fspath(folder)}' has no recovery of node '{node.name}': {os.path.basename(path)} is missing; "
                f"make it with moeshard recover"
            )
    return paths


def _corrected(model: Model, node: PlanNode, recovery: str) -> NodeModel:
    from moeshard.runtime.model import Model

    options = model.load_options | {"n_expert_used": node.n_expert_used}
    return NodeModel(Model(model.path, keep=node.keep, recovery=recovery, **options), None)


def _open_shard(model: Model, plan: Plan, node: PlanNode, folder: str) -> NodeModel:
    from moeshard.runtime.model import Model

    path = _find(model, node, folder)
    file = GGUFMap(path)
    facts = _core.shard_facts(file)
    if facts is None or facts.kind == "trunk":
        raise MoeshardError(f"{path}: is no shard: it does not say which experts it holds")
    if not same_fingerprint(dict(facts.notes).get("fingerprint", ""), plan.model.fingerprint):
        raise MoeshardError(f"{path}: is a shard of another model than {model.path}; split this one by the plan")
    layers = plan.model.moe_layers
    if not np.array_equal(np.array(facts.keep)[layers], node.keep[layers]):
        raise MoeshardError(
            f"{path}: holds other experts than the plan says of node '{node.name}'; write the shards of this plan with "
            f"moeshard split --plan --force"
        )
    if facts.kind == "experts":
        shard = Model(trunk=os.path.join(folder, TRUNK_FILE), experts=path, **model.load_options)
    else:
        shard = model.sibling(path)
    # Where a shard holds fewer experts than a token uses, it was written with --clamp.
    wanted = min(node.n_expert_used or model.n_expert_used, held_range(node.keep, layers)[0])
    if shard.n_expert_used != wanted:
        raise MoeshardError(
            f"{path}: uses {shard.n_expert_used} experts per token, but node '{node.name}' of the plan {wanted}; write "
            f"the shards of this plan with moeshard split --plan --force"
        )
    return NodeModel(shard, None)


def _find(model: Model, node: PlanNode, folder: str) -> str:
    name = shard_name(model.path, node.name)
    path = os.path.join(folder, name)
    if os.path.isfile(path):
        return path
    first = f"{os.path.splitext(name)[0]}-00001-of-"
    try:
        parts = [entry for entry in os.listdir(folder) if entry.startswith(first) and entry.endswith(".gguf")]
    except OSError as error:
        raise MoeshardError(f"cannot read the folder of shards '{folder}': {error.strerror}") from error
    if len(parts) != 1:
        raise MoeshardError(
            f"'{folder}' has no shard of node '{node.name}': {name} is missing; write it with moeshard split --plan"
        )
    return os.path.join(folder, parts[0])
