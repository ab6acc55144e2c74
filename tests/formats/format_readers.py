"""What there is to read in a file of each format, as JSON values.

`make.py` writes down what the release that made the files reads in them; `test_formats.py` compares what is read today.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import moeshard

PROMPT = list(b"moeshard keeps experts")
"""Ids of the kept model's tokens, which are bytes. No router is nearly undecided here, so that rounding which differs
from machine to machine does not change who is chosen."""


def read_profile(folder: Path) -> dict[str, Any]:
    profile = moeshard.read_profile(folder / "profile.npz")
    arrays = ("count", "mass", "saliency", "energy", "entropy", "peak", "together", "cosaliency")
    return {
        "fingerprint": profile.model.fingerprint,
        "domains": profile.domains,
        "layers": profile.layers.tolist(),
        "domain": profile.domain.tolist(),
        "n_tokens": profile.n_tokens.tolist(),
        "facts": profile.facts,
        "shapes": {name: list(getattr(profile, name).shape) for name in arrays},
        "first": {name: getattr(profile, name).ravel()[:24].tolist() for name in arrays},
        "last": {name: getattr(profile, name).ravel()[-24:].tolist() for name in arrays},
        "count": profile.count.sum(axis=0).tolist(),
    }


def read_ranking(folder: Path) -> dict[str, Any]:
    model = moeshard.read_plan(folder / "plan.json").model
    shape = (model.n_layer, model.n_expert, model.moe_layers)
    return {
        name: moeshard.read_ranking(folder / name, *shape).scores.tolist() for name in ("ranking.csv", "profile.npz")
    }


def read_keep(folder: Path) -> dict[str, Any]:
    model = moeshard.read_plan(folder / "plan.json").model
    keep = moeshard.parse_keep(str(folder / "keep.txt"), model.n_layer, model.n_expert)
    return {"keep": keep.astype(int).tolist()}


def _plan(path: Path) -> dict[str, Any]:
    plan = moeshard.read_plan(path)
    return {
        "model": asdict(plan.model),
        "strategy": plan.strategy,
        "parameters": plan.parameters,
        "is_per_layer": plan.is_per_layer,
        "nodes": [
            {"name": n.name, "keep": n.keep.astype(int).tolist(), "used": n.n_expert_used, "facts": n.facts}
            for n in plan.nodes
        ],
        "extra": plan.extra,
    }


def read_plan(folder: Path) -> dict[str, Any]:
    return {name: _plan(folder / name) for name in ("plan.json", "plan-per-layer.json")}


def read_evaluation(folder: Path) -> dict[str, Any]:
    found = moeshard.read_evaluation(folder / "evaluation.json")
    return {
        "model": found.model.fingerprint,
        "plan": [found.plan_file, found.strategy, found.parameters],
        "settings": asdict(found.settings),
        "domains": found.domains,
        "scores": {name: asdict(getattr(found, name)) for name in ("full", "hashed", "placed", "oracle")},
        "groups": [asdict(group) for group in found.groups],
        "probe": found.probe,
        "share": found.share,
        "probes": {name: asdict(scores) for name, scores in found.probes.items()},
        "loops": None if found.loops is None else asdict(found.loops),
    }


def read_curve(folder: Path) -> dict[str, Any]:
    curve = moeshard.read_curve(folder / "curve.json")
    return {
        "model": curve.model.fingerprint,
        "settings": curve.settings,
        "full": asdict(curve.full),
        "strategies": {
            name: [{"keep": point.keep, **asdict(point.scores)} for point in points]
            for name, points in curve.strategies.items()
        },
    }


def read_shards(folder: Path) -> dict[str, Any]:
    """Verify every file of part of the model with the model, and run those that can be run."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.gguf")):
        if path.name != "model.gguf" and "-00002-of-" not in path.name:
            checked = moeshard.verify(path, folder / "model.gguf", logits=path.parent == folder, n_threads=1)
            found[path.relative_to(folder).as_posix()] = {
                "kind": checked.kind,
                "bytes": checked.bytes,
                "experts": [checked.n_expert_fewest, checked.n_expert, checked.n_expert_source],
                "agrees": checked.logits is None or checked.logits.agrees,
            }
    return found


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "profile": read_profile,
    "ranking": read_ranking,
    "keep": read_keep,
    "plan": read_plan,
    "evaluation": read_evaluation,
    "curve": read_curve,
    "shards": read_shards,
}


def open_models(folder: Path) -> dict[str, moeshard.Model]:
    """Return the model and every shard of it, loaded."""
    single = ["model.gguf", "shard.gguf", "clamped.gguf", "per-layer.gguf"]
    files = [*single, *sorted(path.name for path in folder.glob("*-00001-of-*"))]
    models = {name: moeshard.Model(folder / name, n_threads=1) for name in files}
    once = folder / "once"
    models["once"] = moeshard.Model(trunk=once / "trunk.gguf", experts=once / "model.node-0.gguf", n_threads=1)
    return models


def last_logits(model: moeshard.Model, keep: npt.NDArray[np.bool_] | None = None) -> list[float]:
    """Return the logits after a prompt, (n_vocab,)."""
    logits: list[float] = model.logits(PROMPT, keep)[-1].tolist()
    return logits
