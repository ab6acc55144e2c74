"""What a server says about the experts that it holds, and whether that is what a plan says of a node."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap
from moeshard.gguf.fingerprint import same_fingerprint
from moeshard.keep.text import format_ids
from moeshard.placement.nodes import NodeModel
from moeshard.planning.plan import Plan, PlanNode
from moeshard.runtime.model import Model


def keep_digest(ids: Mapping[int, Iterable[int]]) -> str:
    """Return a digest of which experts are held: ids of the whole model's, for each layer that routes."""
    text = "".join(f"{layer} {format_ids(sorted(ids[layer]))}\n" for layer in sorted(ids))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def node_digest(plan: Plan, node: PlanNode) -> str:
    """Return the digest of what a plan's node holds."""
    return keep_digest({layer: np.flatnonzero(node.keep[layer]) for layer in plan.model.moe_layers})


def about(model: Model, plan: Plan | None, nodes: Sequence[NodeModel], n_probe: int) -> dict[str, Any]:
    """Return what a server tells in /props, under ``moeshard``: JSON values.

    Args:
        model: what it has loaded.
        plan: of the nodes that it computes as masks on it, if any.
        nodes: these.
        n_probe: tokens of a first turn that it looks at.
    """
    facts = _core.shard_facts(GGUFMap(model.path))
    known = plan.model.fingerprint if plan is not None else None
    if facts is not None:
        known = dict(facts.notes).get("fingerprint")
    ids = {layer: model.expert_ids[layer][model.expert_ids[layer] >= 0] for layer in model.moe_layers}
    return {
        "version": version("moeshard"),
        "model": known,
        "whole": model.is_whole,
        "keep": keep_digest(ids),
        "n_expert_used": model.n_expert_used,
        "n_probe": n_probe,
        "nodes": None
        if plan is None
        else {
            node.name: {"keep": node_digest(plan, node), "n_expert_used": own.model.n_expert_used}
            for node, own in zip(plan.nodes, nodes, strict=True)
        },
    }


def differs(told: Mapping[str, Any], plan: Plan, node: PlanNode) -> str | None:
    """Say in what a server's `about` is not what a plan says of a node; None where it is that.

    A server that computes the nodes of a plan may be any of them.
    """
    if not _same_model(told, plan):
        return "it serves another model than the plan is for"
    own: Mapping[str, Any] = (told.get("nodes") or {}).get(node.name, told)
    if own.get("keep") != node_digest(plan, node):
        return f"it holds other experts than the plan says of node '{node.name}'"
    if node.n_expert_used is not None and own.get("n_expert_used") != node.n_expert_used:
        return (
            f"it uses {own.get('n_expert_used')} experts per token, but node '{node.name}' of the plan "
            f"{node.n_expert_used}"
        )
    return None


def not_whole(told: Mapping[str, Any], plan: Plan) -> str | None:
    """Say why a server cannot be the one that holds everything; None where it can."""
    if not _same_model(told, plan):
        return "it serves another model than the plan is for"
    if not told.get("whole"):
        return "it does not hold the whole model, only some of its experts"
    every = range(plan.model.n_expert)
    if told.get("keep") != keep_digest(dict.fromkeys(plan.model.moe_layers, every)):
        return "it serves a model of other layers or experts than the plan is for"
    nodes: Mapping[str, Any] | None = told.get("nodes")
    if nodes is not None:
        for node in plan.nodes:
            if node.name not in nodes:
                return f"it serves another plan, without a node '{node.name}'; start both with the same plan"
            why = differs(told, plan, node)
            if why is not None:
                return f"it serves another plan: {why}; start both with the same plan"
    return None


def _same_model(told: Mapping[str, Any], plan: Plan) -> bool:
    # The whole model without a plan does not say: reading its fingerprint takes time.
    known = told.get("model")
    return not isinstance(known, str) or same_fingerprint(known, plan.model.fingerprint)
