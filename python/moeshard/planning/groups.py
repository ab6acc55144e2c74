"""Plans that need no measurement: the experts of a model dealt out to groups."""

from __future__ import annotations

import os
from typing import Any

from moeshard._core import GGUFMap, MoeshardError
from moeshard.gguf.identity import identify
from moeshard.planning.deal import group_experts
from moeshard.planning.plan import Plan, PlanNode
from moeshard.profile.ranking import read_ranking


def plan_groups(
    model: str | os.PathLike[str] | GGUFMap,
    n_groups: int,
    mode: str = "contiguous",
    *,
    ranking: str | os.PathLike[str] | None = None,
    replicate: int = 0,
    n_expert_used: int | None = None,
) -> Plan:
    """Deal the experts of every layer out to groups that together hold all of them.

    Args:
        model: a GGUF file; its header is read.
        n_groups: how many groups, at least 1.
        mode: ``contiguous``, ``balanced``, ``ranked`` or ``snake``; see docs/plans.md.
        ranking: a CSV or profile with a score per layer and expert; `read_ranking` says more.
        replicate: so many of the best experts of each layer are in every group.
        n_expert_used: experts per token on every node; None: as many as the model says.

    Raises:
        MoeshardError: the model is dense, the mode needs a ranking, or the ranking does not fit the model.
    """
    source = model if isinstance(model, GGUFMap) else GGUFMap(model)
    identity = identify(source)
    if not identity.moe_layers:
        raise MoeshardError(f"{source.path}: has no experts to take out: it is a dense model, or a trunk")
    shape = (identity.n_layer, identity.n_expert, identity.moe_layers)
    keeps = group_experts(
        mode,
        n_groups,
        *shape,
        ranking=None if ranking is None else read_ranking(ranking, *shape),
        replicate=replicate,
        expert_groups=source.moe_layout().n_expert_groups,
    )
    parameters: dict[str, Any] = {"groups": n_groups, "replicate": replicate}
    if ranking is not None:
        parameters["ranking"] = os.path.basename(os.fspath(ranking))
    nodes = [PlanNode(f"group-{i}", keep, n_expert_used) for i, keep in enumerate(keeps)]
    return Plan(nodes, mode, parameters, identity)
