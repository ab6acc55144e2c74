"""Plans: which experts each node holds, of which model, and what the planner says about it. Schema: docs/plans.md."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeshard._core import MoeshardError
from moeshard.files.atomic import write_atomically
from moeshard.files.documents import (
    check_other,
    check_version,
    expect,
    other_keys,
    parse_named,
    read_document,
    take,
    write_document,
)
from moeshard.gguf.identity import ModelIdentity, check_model, model_from_json, model_to_json
from moeshard.keep.text import Keep, format_ids, format_row, parse_row

VERSION = 1
PER_LAYER = "per_layer"
"""True among the parameters of a plan whose nodes may hold different numbers of experts in different layers."""

# A node's name becomes part of a file name.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", re.ASCII)
_LAYER = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)

_PLAN_KEYS = ("moeshard_plan", "model", "strategy", "parameters", "nodes")
_NODE_KEYS = ("name", "n_expert_used", "keep")


@dataclass(frozen=True, eq=False)
class PlanNode:
    """What one node holds."""

    name: str
    """Letters, digits, ``-``, ``_`` and ``.``, not beginning with ``.``: it becomes part of a file name."""
    keep: Keep
    """bool (n_layer, n_expert)."""
    n_expert_used: int | None = None
    """Experts that each token uses on this node; None: as many as the model says."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else a planner says about the node (bytes, captured share, …): JSON values."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Nodes and what each holds. Making one raises a `MoeshardError` that names the field which is wrong."""

    nodes: list[PlanNode]
    strategy: str
    """What chose the experts, e.g. ``snake``."""
    parameters: dict[str, Any]
    """What it was told to do: JSON values."""
    model: ModelIdentity
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else the file says: JSON values."""

    def __post_init__(self) -> None:
        check_model(self.model)
        if not self.nodes:
            raise MoeshardError("nodes: a plan needs at least one")
        names: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            where = f"nodes[{index}]"
            _check_node(node, self.model, where)
            # Some file systems do not tell upper from lower case.
            first = names.setdefault(node.name.lower(), index)
            if first != index:
                raise MoeshardError(
                    f"{where}.name: '{node.name}' is the name of nodes[{first}] too; give each node its own, "
                    f"different in more than upper and lower case"
                )
        check_other(self.extra, _PLAN_KEYS, "extra")

    @property
    def is_per_layer(self) -> bool:
        """Whether nodes were meant to hold different numbers of experts in different layers."""
        return self.parameters.get(PER_LAYER) is True

    def to_json(self) -> str:
        """Write the plan as `read_plan` reads it. Rows of layers that do not route are not written.

        Raises:
            MoeshardError: parameters, facts or extra hold something that JSON has no word for, such as NaN.
        """
        document = {
            "moeshard_plan": VERSION,
            "model": model_to_json(self.model),
            "strategy": self.strategy,
            "parameters": self.parameters,
            "nodes": [_node_to_json(node, self.model) for node in self.nodes],
            **self.extra,
        }
        return write_document(document, "plan")

    def write(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the plan to a file, which appears whole or not at all.

        Raises:
            MoeshardError: as `to_json`, or the file cannot be written, or it exists and `force` is False.
        """
        write_atomically(path, self.to_json(), force=force)

    def check(self, model: ModelIdentity) -> None:
        """Raise a `MoeshardError` that names both models where the plan was made for another one than `model`."""
        if not self.model.is_same(model):
            raise MoeshardError(
                f"the plan was made for the model {self.model}, but this one is {model}; use that model, or make a "
                f"plan for this one"
            )


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Args:
        path: JSON of version 1, UTF-8.

    Returns:
        The plan; rows of layers that do not route are True. What the file says beyond the schema is in `Plan.extra`,
        `ModelIdentity.facts` and `PlanNode.facts`, and is written back.

    Raises:
        MoeshardError: the file cannot be read, is no plan, or is of another version; naming the file and the place in
            it, such as ``nodes[2].keep["5"]``.
    """
    return parse_named(path, "plan", read_document(path, "plan"), plan_from_json)


def _check_node(node: PlanNode, model: ModelIdentity, where: str) -> None:
    if not _NAME.fullmatch(node.name):
        raise MoeshardError(
            f"{where}.name: '{node.name}' cannot be part of a file name; use letters, digits, '-', '_' and '.', and do "
            f"not begin with '.'"
        )
    shape = (model.n_layer, model.n_expert)
    if node.keep.shape != shape or node.keep.dtype != np.bool_:
        raise MoeshardError(
            f"{where}.keep: must be a bool array {shape}, got {node.keep.dtype} of shape {node.keep.shape}"
        )
    if node.n_expert_used is not None:
        fewest = int(node.keep[model.moe_layers].sum(axis=1).min())
        if not 1 <= node.n_expert_used <= fewest:
            raise MoeshardError(
                f"{where}.n_expert_used: a token cannot use {node.n_expert_used} experts where the node holds {fewest} "
                f"in some layer; use at least 1, and hold at least as many in every layer"
            )
    check_other(node.facts, _NODE_KEYS, f"{where}.facts")


def _node_to_json(node: PlanNode, model: ModelIdentity) -> dict[str, Any]:
    used = {} if node.n_expert_used is None else {"n_expert_used": node.n_expert_used}
    keep = {str(layer): format_row(node.keep[layer]) for layer in model.moe_layers}
    return {"name": node.name, **used, "keep": keep, **node.facts}


def plan_from_json(document: dict[str, Any]) -> Plan:
    """Read the document of a file, as `read_plan` does."""
    check_version(document, "moeshard_plan", VERSION, "plan")
    model = model_from_json(take(document, "model", dict))
    nodes = [
        _node_from_json(expect(node, dict, f"nodes[{index}]"), model, f"nodes[{index}]")
        for index, node in enumerate(take(document, "nodes", list))
    ]
    return Plan(
        nodes=nodes,
        strategy=take(document, "strategy", str),
        parameters=take(document, "parameters", dict),
        model=model,
        extra=other_keys(document, _PLAN_KEYS),
    )


def _node_from_json(value: dict[str, Any], model: ModelIdentity, where: str) -> PlanNode:
    used = None if value.get("n_expert_used") is None else take(value, "n_expert_used", int, where)
    return PlanNode(
        name=take(value, "name", str, where),
        keep=_keep_from_json(take(value, "keep", dict, where), model, f"{where}.keep"),
        n_expert_used=used,
        facts=other_keys(value, _NODE_KEYS),
    )


def _keep_from_json(rows: dict[str, Any], model: ModelIdentity, where: str) -> Keep:
    keep = np.ones((model.n_layer, model.n_expert), dtype=np.bool_)
    missing = set(model.moe_layers)
    for key, row in rows.items():
        place = f'{where}["{key}"]'
        layer = int(key) if _LAYER.fullmatch(key) else -1
        if layer not in missing:
            raise MoeshardError(
                f"{place}: '{key}' is not one of the layers that route (model.moe_layers), "
                f"{format_ids(model.moe_layers)}"
            )
        missing.remove(layer)
        keep[layer] = parse_row(expect(row, str, place), place, model.n_expert)
    if missing:
        absent = sorted(missing)
        raise MoeshardError(
            f"{where}: nothing is said for layer{'s' if len(absent) > 1 else ''} {format_ids(absent)}; add an entry "
            f'for each, such as "{absent[0]}": "all"'
        )
    return keep
