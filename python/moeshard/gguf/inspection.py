"""What a GGUF says about its experts, read from the header alone."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from moeshard._core import GGUFMap, MoeshardError


@dataclass(frozen=True)
class ExpertTensorInfo:
    """A tensor that changes when experts are left out."""

    name: str
    layer: int
    role: str
    """slab, per-expert value, router, …: what the axis of experts means in it."""
    type: str
    """ggml's name of the element type, e.g. ``q8_0``."""
    shape: tuple[int, ...]
    """In elements, outermost axis first."""
    expert_axis: int | None
    """Which axis of `shape` counts experts; None where the values are expert ids."""
    bytes: int
    bytes_per_expert: int


@dataclass(frozen=True)
class Inspection:
    """A model file; bytes are of tensor data, per layer means an entry for every layer of the model."""

    path: str
    parts: tuple[str, ...]
    file_bytes: int
    """All parts, headers included."""
    arch: str
    name: str | None
    """The name that the file gives its model."""
    n_params: int
    n_ctx_train: int | None
    n_layer: int
    n_layer_nextn: int
    """Of them, blocks at the end that predict further tokens and are not part of the usual computation."""
    n_expert: int
    """0 for a dense model."""
    expert_counts: tuple[int, ...]
    """Per layer: `n_expert`, but in a shard whose layers hold different numbers; 0 where nothing is routed."""
    n_expert_used: tuple[int, ...]
    """Per layer: experts that each token uses; 0 where nothing is routed."""
    n_expert_shared: int
    """Experts that every token uses; they belong to the trunk."""
    n_expert_groups: int
    n_expert_groups_used: int
    gating: str
    selection: str
    renormalized: bool
    """Whether the weights of a token's experts are divided by their sum."""
    moe_layers: tuple[int, ...]
    hash_layers: tuple[int, ...]
    """Of them, those that look a token's experts up in a table."""
    type_bytes: dict[str, int]
    """Tensor bytes per element type, largest first."""
    trunk_bytes: int
    expert_bytes: int
    per_expert_bytes: tuple[int, ...]
    """Per layer: of one expert."""
    active_bytes: int
    """Trunk and the experts that one token uses."""
    expert_tensors: tuple[ExpertTensorInfo, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values, ready for JSON."""
        return asdict(self)


def shown(text: Any) -> str | None:
    """Return a string of the metadata as it can be shown, bytes that are no UTF-8 as ``\\xe8``; None for all else."""
    if not isinstance(text, str):
        return None
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def files_of(path: str | os.PathLike[str]) -> list[str]:
    """Return the files of a model of which one is given: all its parts; where that is no GGUF file, itself."""
    try:
        return [part.path for part in GGUFMap(path).parts]
    except MoeshardError:
        return [os.fspath(path)]


def inspect_model(path: str | os.PathLike[str]) -> Inspection:
    """Read what the header of a GGUF file (any part of it, if there are several) says. No weight is read.

    Raises:
        MoeshardError: the file is missing, damaged, or its expert tensors follow no known rule.
    """
    gguf = GGUFMap(os.fspath(path))
    layout = gguf.moe_layout()
    infos = gguf.tensor_infos
    types: dict[str, int] = {}
    for info in infos:
        types[info.type] = types.get(info.type, 0) + info.nbytes
    tensors = []
    for entry in layout.tensors:
        info = infos[entry.index]
        # Writers may leave out outermost axes of length 1, such as that of a model with one expert.
        shape = (1,) * (entry.axis + 1 - len(info.shape)) + tuple(info.shape)
        tensors.append(
            ExpertTensorInfo(
                name=info.name,
                layer=entry.layer,
                role=entry.role,
                type=info.type,
                shape=shape,
                expert_axis=None if entry.axis < 0 else len(shape) - 1 - entry.axis,
                bytes=info.nbytes,
                bytes_per_expert=entry.slice_bytes,
            )
        )
    metadata = gguf.metadata
    used = zip(layout.n_expert_used, layout.per_expert_bytes, strict=True)
    return Inspection(
        path=gguf.path,
        parts=tuple(part.path for part in gguf.parts),
        file_bytes=sum(part.size for part in gguf.parts),
        arch=layout.arch,
        name=shown(metadata.get("general.name")),
        n_params=sum(math.prod(info.shape) for info in infos),
        n_ctx_train=metadata.get(f"{layout.arch}.context_length"),
        n_layer=layout.n_layer,
        n_layer_nextn=layout.n_layer_nextn,
        n_expert=layout.n_expert,
        expert_counts=tuple(layout.expert_counts),
        n_expert_used=tuple(layout.n_expert_used),
        n_expert_shared=int(metadata.get(f"{layout.arch}.expert_shared_count") or 0),
        n_expert_groups=layout.n_expert_groups,
        n_expert_groups_used=layout.n_expert_groups_used,
        gating=layout.gating,
        selection=layout.selection,
        renormalized=layout.renormalized,
        moe_layers=tuple(layout.moe_layers),
        hash_layers=tuple(layout.hash_layers),
        type_bytes=dict(sorted(types.items(), key=lambda item: -item[1])),
        trunk_bytes=layout.trunk_bytes,
        expert_bytes=layout.expert_bytes,
        per_expert_bytes=tuple(layout.per_expert_bytes),
        active_bytes=layout.trunk_bytes + sum(count * size for count, size in used),
        expert_tensors=tuple(tensors),
    )
