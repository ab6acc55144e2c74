"""Which file, or which segments of files, a model is loaded from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeLayout, MoeshardError, SegmentList
from moeshard.gguf.corrections import open_corrections
from moeshard.gguf.identity import identify

if TYPE_CHECKING:
    from moeshard.keep.text import Keep, KeepSpec

StrPath = str | os.PathLike[str]


class Source(TypedDict):
    """The arguments of `moeshard.Model` that say what is loaded."""

    path: StrPath | None
    keep: Any
    trunk: StrPath | None
    experts: StrPath | None
    n_expert_used: int
    recovery: StrPath | None


@dataclass(frozen=True)
class Origin:
    """Where a model comes from."""

    path: str
    """Stands for the model in messages."""
    segments: SegmentList | None
    """What is read where the model is no file."""
    held: Keep | None
    """bool (n_layer, n_expert) of the whole model, where only some of its experts are loaded."""
    source: Source | None = None
    """The arguments that it was found by; None where it was made of segments."""

    def layout(self) -> MoeLayout:
        """Return what of the loaded model depends on its experts."""
        return (self.segments or GGUFMap(self.path)).moe_layout()

    def load(self, options: LoadOptions, progress: Callable[[float], object] | None) -> _core.Model:
        """Load it into the engine of this process."""
        return _core.Model(
            self.path,
            self.segments,
            n_gpu_layers=options["n_gpu_layers"],
            mmap=options["mmap"],
            # Segments carry it in their header.
            n_expert_used=0 if self.segments else options["n_expert_used"],
            rpc=options["rpc"],
            layer_split=options["layer_split"] or (),
            progress=progress,
        )


class LoadOptions(TypedDict):
    """The arguments of `moeshard.Model` that say how it is loaded."""

    n_gpu_layers: int
    mmap: bool
    n_expert_used: int
    rpc: list[str]
    layer_split: list[int] | None
    """None: as fits the workers' memory."""


def find_origin(
    path: StrPath | Origin | None,
    keep: KeepSpec | None,
    trunk: StrPath | None,
    experts: StrPath | None,
    n_expert_used: int,
    recovery: StrPath | None = None,
) -> Origin:
    """Read the arguments of `moeshard.Model`. Headers are read, no weights."""
    if recovery is not None and (keep is None or not isinstance(path, (str, os.PathLike))):
        raise MoeshardError("a recovery goes with the path of a whole model and the keep that it was made for")
    if isinstance(path, Origin):
        return path
    source: Source = {
        "path": path,
        "keep": keep,
        "trunk": trunk,
        "experts": experts,
        "n_expert_used": n_expert_used,
        "recovery": recovery,
    }
    return replace(_find(**source), source=source)


def _find(
    path: StrPath | None,
    keep: KeepSpec | None,
    trunk: StrPath | None,
    experts: StrPath | None,
    n_expert_used: int,
    recovery: StrPath | None,
) -> Origin:
    if path is not None and trunk is None and experts is None:
        name = os.fspath(path)
        return _file(name) if keep is None else _part_of(name, keep, n_expert_used, recovery)
    if path is None and trunk is not None and experts is not None:
        if keep is not None or n_expert_used:
            raise MoeshardError("keep and n_expert_used go with the path of a whole model, not with trunk and experts")
        segments = _core.join_segments(GGUFMap(trunk), GGUFMap(experts))
        return Origin(os.fspath(experts), segments, _held(GGUFMap(experts)))
    raise MoeshardError("give either the path of a model, or both trunk and experts")


def _file(path: str) -> Origin:
    # What is no GGUF is reported by the engine's loader, which looks at more.
    try:
        file = GGUFMap(path)
    except MoeshardError:
        return Origin(path, None, None)
    return Origin(file.path, None, _held(file))


def _part_of(path: str, keep: KeepSpec, n_expert_used: int, recovery: StrPath | None) -> Origin:
    from moeshard.keep.text import expert_layers, parse_keep

    file = GGUFMap(path)
    layout = file.moe_layout()
    held = parse_keep(keep, layout.n_layer, layout.n_expert, moe_layers=expert_layers(layout))
    corrected: dict[str, Any] = {}
    if recovery is not None:
        corrections = open_corrections(recovery)
        corrections.check(identify(file), held, n_expert_used)
        corrected = {"corrected": corrections.file, "corrected_names": corrections.names}
    segments = _core.shard_segments(file, held, n_expert_used=n_expert_used, per_layer=True, **corrected)[0]
    return Origin(file.path, segments, held)


def _held(file: GGUFMap) -> Keep | None:
    facts = _core.shard_facts(file)
    return None if facts is None or facts.kind == "trunk" else np.array(facts.keep)
