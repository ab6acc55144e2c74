"""Writing expert shards: the trunk of a model with some of its experts, as GGUF files of their own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeshardError, SegmentList
from moeshard.files.atomic import made_folder
from moeshard.gguf.corrections import open_corrections
from moeshard.gguf.identity import ModelIdentity, identify, no_experts
from moeshard.keep.text import Keep, KeepSpec, held_range, parse_keep
from moeshard.planning.plan import Plan, PlanNode
from moeshard.progress import Progress

TRUNK = "trunk"
TRUNK_FILE = "trunk.gguf"
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class ShardFile:
    """A shard, written or (in a dry run) only laid out."""

    name: str
    """Of the node, or ``trunk``."""
    kind: str
    """``shard``, ``trunk`` or ``experts``."""
    paths: tuple[str, ...]
    """Its files: one, or parts as llama.cpp numbers them."""
    bytes: int
    """Of all its files together."""
    n_expert: int
    """Experts held per layer, by the layer that holds most; 0 for a trunk."""
    n_expert_fewest: int
    """Experts held by the layer that holds fewest."""
    n_segments: int
    """Pieces that it is copied from."""


@dataclass(frozen=True)
class Shards:
    """A shard laid out: what would be written where. Nothing has been written yet."""

    facts: ShardFile
    files: list[SegmentList]


def split(
    model: str | os.PathLike[str] | GGUFMap,
    keeps: KeepSpec | Sequence[KeepSpec] | Plan,
    out: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    n_expert_used: int | None = None,
    clamp: bool = False,
    per_layer: bool = False,
    trunk_once: bool = False,
    recovery: str | os.PathLike[str] | None = None,
    with_router: bool = False,
    max_file_size: int | None = None,
    only: int | None = None,
    write_plan: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    dry_run: bool = False,
    force: bool = False,
    jobs: int = 0,
    progress: Progress | None = None,
) -> list[ShardFile]:
    """Write shards of a model: ordinary GGUF files that any llama.cpp loads.

    A shard of a keep computes what the whole model computes under that keep as a mask. All shards are written in one
    pass over the model; none appears under its name before all are complete.

    Args:
        model: a GGUF file, or any part of one.
        keeps: what each shard holds. One keep (bool ``(n_layer, n_expert)``, or all else that `parse_keep` reads) makes
            one shard, `out` being its file; a list of keeps or a `Plan` makes a shard each, in the folder `out`.
        out: a file for one keep, else a folder, which is made where it is missing.
        names: of the shards, ``group-0`` and so on by default; the files are called ``MODEL.NAME.gguf``.
        n_expert_used: experts per token that the shards ask for; None: as many as the model says (or the plan).
        clamp: where fewer experts are held than a token uses, use those; without it that is an error.
        per_layer: layers may hold different numbers of experts. Such shards are loaded by moeshard only; stock
            llama.cpp refuses them. A plan that was made so needs no word here.
        trunk_once: write what all shards share once, as ``trunk.gguf``, and files of experts only, to be loaded by
            ``moeshard.Model(trunk=…, experts=…)``.
        recovery: what `moeshard.recover` wrote: the folder of a plan's recoveries, or the file of a single keep. Shards
            hold the corrected tensors instead of the model's.
        with_router: write the whole routers into the shards' metadata, so that who runs a shard can measure what it
            makes tokens miss (`Session.missed`). Other programs pass them over.
        max_file_size: bytes; a larger shard becomes several numbered parts.
        only: write this shard alone (from 0).
        write_plan: into the folder also write ``plan.json``, which says what each shard holds.
        inputs: files that the keeps were read from: none of them is replaced.
        dry_run: lay everything out, say what would be written, and write nothing.
        force: replace existing files.
        jobs: threads that copy; 0 for as many as are useful.
        progress: see `Progress`; in bytes.

    Returns:
        What was written, the trunk first where there is one.

    Raises:
        MoeshardError: the model is damaged, dense or itself a shard; a keep does not fit; layers (without `per_layer`)
            or expert groups of a keep hold unequal numbers of experts; a file exists or cannot be written. Nothing is
            left behind then.
    """
    source = model if isinstance(model, GGUFMap) else GGUFMap(model)
    identity = identify(source)
    if not identity.moe_layers:
        raise no_experts(source.path, identity)
    single = not isinstance(keeps, Plan) and not _is_list(keeps)
    if single and trunk_once:
        raise MoeshardError("trunk_once needs several keeps, or a folder to write to; give a list of keeps")
    plan = _as_plan(keeps, identity, names, n_expert_used, single)
    plan.check(identity)
    nodes = _chosen(plan.nodes, only)
    laid_out = lay_out(
        source, plan, nodes, out, single, clamp, per_layer, trunk_once, max_file_size or 0, recovery, with_router
    )
    if not dry_run:
        files: list[SegmentList | bytes] = [segments for shard in laid_out for segments in shard.files]
        paths = [path for shard in laid_out for path in shard.facts.paths]
        plan_path = os.path.join(out, PLAN_FILE)
        if write_plan and not single and _plan_is_new(plan, plan_path, inputs, force):
            files.append(plan.to_json().encode())
            paths.append(plan_path)
        with nullcontext() if single else made_folder(out):
            _core.write_segments(files, paths, force=force, jobs=jobs, inputs=inputs, progress=progress)
    return [shard.facts for shard in laid_out]


def lay_out(
    source: GGUFMap,
    plan: Plan,
    nodes: Sequence[PlanNode],
    out: str | os.PathLike[str],
    single: bool,
    clamp: bool,
    per_layer: bool,
    trunk_once: bool,
    max_file_size: int,
    recovery: str | os.PathLike[str] | None = None,
    with_router: bool = False,
) -> list[Shards]:
    """Lay the shards of `nodes` out; arguments as of `split`. Reads headers and writes nothing."""
    folder = os.fspath(out)
    laid_out = []
    # What a model in one file says of its parts: `merge` gives it back.
    entries = _core.split_entries(source)
    divided = [("split_entries", entries)] if entries else []
    if trunk_once:
        files = _core.shard_segments(
            source, None, kind=TRUNK, max_file_size=max_file_size, notes=notes_of(plan.model, plan, None) + divided
        )
        laid_out.append(_shards(TRUNK, TRUNK, files, os.path.join(folder, TRUNK_FILE), (0, 0)))
    kind = "experts" if trunk_once else "shard"
    for node in nodes:
        notes = notes_of(plan.model, plan, node) + divided
        corrected: dict[str, Any] = {}
        if recovery is not None:
            own = recovery if single else os.path.join(recovery, recovery_name(source.path, node.name))
            corrections = open_corrections(own)
            corrections.check(plan.model, node.keep, node.n_expert_used)
            corrected = {"corrected": corrections.file, "corrected_names": corrections.names}
            if corrections.names:  # else no layer was better off corrected
                notes.append(corrections.note())
        files = _core.shard_segments(
            source,
            node.keep,
            kind=kind,
            n_expert_used=node.n_expert_used or 0,
            clamp=clamp,
            per_layer=per_layer or plan.is_per_layer,
            max_file_size=max_file_size,
            with_router=with_router,
            notes=notes,
            **corrected,
        )
        path = folder if single else os.path.join(folder, shard_name(source.path, node.name))
        held = held_range(node.keep, plan.model.moe_layers)
        laid_out.append(_shards(node.name, kind, files, path, held))
    return laid_out


def notes_of(model: ModelIdentity, plan: Plan, node: PlanNode | None) -> list[tuple[str, str]]:
    """What a shard says about where it comes from, beside the experts it holds."""
    notes = [("version", version("moeshard")), ("fingerprint", model.fingerprint)]
    about: dict[str, Any] = {"strategy": plan.strategy, "parameters": plan.parameters, "nodes": len(plan.nodes)}
    if node is not None:
        about |= {"node": node.name} | node.facts
        if node.n_expert_used is not None:
            about["n_expert_used"] = node.n_expert_used
    return [*notes, ("plan", json.dumps(about))]


def custom_plan(identity: ModelIdentity, keeps: Sequence[Keep], names: Sequence[str], used: int | None) -> Plan:
    """Return the plan that stands for keeps given as such."""
    nodes = [PlanNode(name, keep, used) for name, keep in zip(names, keeps, strict=True)]
    return Plan(nodes, "custom", {}, identity)


def _as_plan(
    keeps: KeepSpec | Sequence[KeepSpec] | Plan,
    identity: ModelIdentity,
    names: Sequence[str] | None,
    used: int | None,
    single: bool,
) -> Plan:
    if isinstance(keeps, Plan):
        if names is not None or used is not None:
            raise MoeshardError(
                "a plan names its nodes and their experts per token itself; leave names and n_expert_used"
            )
        return keeps
    specs: Sequence[Any] = [keeps] if single else list(keeps)  # type: ignore[arg-type]
    arrays = [parse_keep(spec, identity.n_layer, identity.n_expert, moe_layers=identity.moe_layers) for spec in specs]
    if names is None:
        names = [f"group-{i}" for i in range(len(arrays))]
    if len(names) != len(arrays):
        raise MoeshardError(f"{len(arrays)} keeps need as many names, got {len(names)}")
    return custom_plan(identity, arrays, names, used)


def _is_list(keeps: Any) -> bool:
    """Several keeps, and not one written as a list of ids or of rows."""
    if isinstance(keeps, np.ndarray):
        return keeps.ndim == 3
    if not isinstance(keeps, (list, tuple)):
        return False
    return any(isinstance(keep, (str, os.PathLike, set, frozenset)) or np.ndim(keep) == 2 for keep in keeps)


def _chosen(nodes: Sequence[PlanNode], only: int | None) -> Sequence[PlanNode]:
    if only is None:
        return nodes
    if not 0 <= only < len(nodes):
        raise MoeshardError(f"there is no shard {only}: there are {len(nodes)}, numbered from 0 to {len(nodes) - 1}")
    return [nodes[only]]


def _shards(name: str, kind: str, files: list[SegmentList], path: str, held: tuple[int, int]) -> Shards:
    paths = [path] if len(files) == 1 else [_core.part_path(path, i, len(files)) for i in range(len(files))]
    fewest, most = held
    n_segments = sum(len(file.segments) for file in files)
    facts = ShardFile(name, kind, tuple(paths), sum(file.size for file in files), most, fewest, n_segments)
    return Shards(facts, files)


def shard_name(model: str, node: str) -> str:
    """Return what the shard of a node is called: for ``dir/model-00001-of-00003.gguf``, ``model.NODE.gguf``."""
    return re.sub(r"-\d{5,}-of-\d{5,}$", "", Path(model).stem) + f".{node}.gguf"


def recovery_name(model: str, node: str) -> str:
    """Return what the recovery of a node is called: ``model.NODE.recovery.gguf``."""
    return shard_name(model, node).removesuffix(".gguf") + ".recovery.gguf"


def _plan_is_new(plan: Plan, path: str, inputs: Sequence[str | os.PathLike[str]], force: bool) -> bool:
    """Whether a plan is to be written beside its shards; where another one lies there, an error comes first."""
    if not os.path.isfile(path):
        return True
    if any(os.path.exists(read) and os.path.samefile(read, path) for read in inputs):
        return False
    try:
        same = Path(path).read_bytes() == plan.to_json().encode()
    except OSError as error:
        raise MoeshardError(f"{path}: cannot read: {error.strerror}") from error
    if not same and not force:
        raise MoeshardError(f"{path}: is another plan; choose another folder, or replace it with --force (force=True)")
    return not same
