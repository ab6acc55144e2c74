"""Recovering the nodes of a plan: what their missing experts did, given back by those that they hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeshardError
from moeshard.files.atomic import check_outputs, made_folder
from moeshard.files.provenance import stamp
from moeshard.gguf.identity import identify, no_experts
from moeshard.placement.nodes import masked_nodes
from moeshard.planning.plan import Plan, read_plan
from moeshard.progress import StageProgress
from moeshard.recovery.calibration import calibrate, owners
from moeshard.recovery.layer import DOWN, GAIN, RIDGES
from moeshard.recovery.node import SOURCE, LayerReport, NodeFit, NodeTask, Settings
from moeshard.recovery.streams import Streams, Text
from moeshard.shards.split import recovery_name
from moeshard.traffic.domains import Domain, embedded_traffic
from moeshard.traffic.likeness import sketch
from moeshard.traffic.windows import WINDOW

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

PARTS = (DOWN, GAIN)
_PLACING = 0.1
"""The part of the work that placing the text is, about: for the progress only."""
PROMPT = 64


@dataclass(frozen=True)
class Recovered:
    """A recovery that was written."""

    node: str
    path: str
    bytes: int
    """Of the corrected tensors."""
    bytes_before: int
    """Of the tensors in whose place they are."""
    windows: int
    """Of text that belonged to the node."""
    layers: list[LayerReport]


def recover(
    model: Model | str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str],
    out: str | os.PathLike[str],
    domains: Sequence[Domain] | None = None,
    *,
    nodes: Sequence[str] | None = None,
    parts: Sequence[str] = PARTS,
    passes: int | None = None,
    ridge: float | None = None,
    recover_type: str = SOURCE,
    n_windows: int | None = None,
    window: int = WINDOW,
    n_prompt: int = PROMPT,
    inputs: Sequence[str | os.PathLike[str]] = (),
    resume: bool = False,
    force: bool = False,
    command: Sequence[str] | None = None,
    progress: StageProgress | None = None,
) -> list[Recovered]:
    """Fit the experts of a plan's nodes to do what the whole model does, and write a recovery of each.

    Args:
        model: the whole model, or its file.
        plan: of that model, or its file.
        out: the folder to write to; it is made where it is missing.
        domains: text of the kinds that the plan was made for; None: the embedded calibration texts.
        nodes: names of the nodes to recover; None: all.
        parts: what is fitted: ``down``, the down projections of the kept experts, all of a layer jointly; ``gain``, a
            factor for each kept expert.
        passes: blocks of layers that are corrected one after the other, each in a pass over the text; None: one for
            each layer.
        ridge: how strongly projections are held at what they are, in units of the mean square of what they are applied
            to; None: what is best on text that is held out of this one.
        recover_type: ggml's name of the type that corrected projections are written in; ``source``: their own.
        n_windows: of each domain, evenly spread over its text; None: all.
        window: tokens in each.
        n_prompt: of them, by so many a window is placed on a node.
        inputs: files that all this was read from: none of them is replaced.
        resume: go on from the partial files of an earlier run with the same arguments.
        force: replace existing files.
        command: what is running this, for the record.
        progress: see `StageProgress`.

    Raises:
        MoeshardError: the plan is for another model, the text is too short, an argument is out of range, a file exists,
            or the model has no experts that are known how to correct.
    """
    from moeshard.runtime.model import Model

    settings = _settings(parts, passes, ridge, recover_type)
    loaded = model if isinstance(model, Model) else Model(model)
    planned = plan if isinstance(plan, Plan) else read_plan(plan)
    source = GGUFMap(loaded.path)
    identity = identify(source)
    if not identity.moe_layers:
        raise no_experts(source.path, identity)
    planned.check(identity)
    if not loaded.is_whole:
        raise MoeshardError(f"{loaded.path}: only some of its experts are loaded; load the whole model")
    chosen = [node for node in planned.nodes if nodes is None or node.name in nodes]
    unknown = sorted(set(nodes or ()) - {node.name for node in planned.nodes})
    if unknown:
        names = ", ".join(node.name for node in planned.nodes)
        raise MoeshardError(f"the plan has no node '{unknown[0]}'; it has {names}")
    texts = embedded_traffic("calibration") if domains is None else list(domains)
    paths = [os.path.join(out, recovery_name(source.path, node.name)) for node in chosen]

    def step(stage: str, part: float) -> None:
        if progress is not None:
            progress(stage, part)

    with made_folder(out):  # none of it stays where the work ends early
        check_outputs(paths, [source.path, *inputs], force=force)
        calibration = calibrate(loaded, texts, window, n_windows)
        masks = [node.keep for node in planned.nodes]
        used = [node.n_expert_used for node in planned.nodes]
        owner = owners(
            loaded,
            masks,
            masked_nodes(loaded, masks, used),
            calibration,
            min(n_prompt, window - 1),
            lambda done, total: step("placing the text", _PLACING * done / total),
        )
        about: dict[str, Any] = {
            "parts": list(settings.parts),
            "ridges": list(settings.ridges),
            "passes": settings.passes,
            "type": settings.kind,
            "window": window,
            "windows": n_windows,
            "prompt": n_prompt,
            "texts": {domain.name: domain.digest for domain in texts},
            "sketches": {domain.name: sketch(domain) for domain in texts},
            "made": stamp(command),
        }
        fit = NodeFit(loaded, source, identity, Streams(loaded, window, loaded.computed_layers), settings)
        results = []
        for index, (node, path) in enumerate(zip(chosen, paths, strict=True)):
            mine = np.flatnonzero(owner == planned.nodes.index(node))
            first, second = calibration.divide(mine)
            read, judged = (Text(first[0]), Text(second[0])), (Text(first[1]), Text(second[1]))
            facts = {"node": node.name, "n_expert_used": node.n_expert_used, **about}
            task = NodeTask(node.name, node.keep, node.n_expert_used, read, judged, path, facts)

            def part(stage: str, done: float, index: int = index) -> None:
                step(stage, _PLACING + (1 - _PLACING) * (index + done) / len(chosen))

            found = fit.run(task, resume=resume, force=force, progress=part)
            sizes = _sizes(source, node.keep, found.tensors)
            results.append(Recovered(node.name, path, *sizes, len(mine), found.layers))
    return results


def _settings(parts: Sequence[str], passes: int | None, ridge: float | None, kind: str) -> Settings:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise MoeshardError(f"unknown part '{''.join(unknown)}' to recover; choose from {', '.join(PARTS)}")
    if passes is not None and passes < 1:
        raise MoeshardError(f"passes must be positive, got {passes}")
    if ridge is not None and not 0 < ridge < np.inf:
        raise MoeshardError(f"ridge must be positive, got {ridge}")
    if kind != SOURCE:
        _core.quantize(kind, np.zeros((0, 256), dtype=np.float32), np.ones(256, dtype=np.float32))
    ordered = tuple(part for part in PARTS if part in parts)
    return Settings(ordered, passes, RIDGES if ridge is None else (ridge,), kind)


def _sizes(source: GGUFMap, keep: Any, tensors: list[tuple[str, str, tuple[int, ...], bytes]]) -> tuple[int, int]:
    """Return bytes of corrected tensors, and of those of the model in whose place they are."""
    before = 0
    names = {name for name, _, _, _ in tensors}
    for expert in source.moe_layout().tensors:
        if source.tensor_infos[expert.index].name in names:
            before += int(keep[expert.layer].sum()) * expert.slice_bytes
    return sum(len(data) for _, _, _, data in tensors), before
