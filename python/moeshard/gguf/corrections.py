"""Tensors that a shard holds instead of its model's: a recovery file, and what it says about itself.

A recovery is a GGUF of the corrected tensors of one node, under the names and in the shapes that they have in its
shard. All else that it says is one JSON document in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeshardError
from moeshard.files.documents import check_version, parse_document, take
from moeshard.gguf.identity import ModelIdentity, model_from_json
from moeshard.keep.text import Keep, format_row, parse_row

_T = TypeVar("_T")

VERSION = 1
KEY = "moeshard.recovery"
NOTE = "corrected"
"""Of a shard: what of it was corrected, by what."""


@dataclass(frozen=True, eq=False)
class Corrections:
    """A recovery file, opened."""

    file: GGUFMap
    document: dict[str, Any]

    @cached_property
    def model(self) -> ModelIdentity:
        """The model that it was made for."""
        return self._read(lambda: model_from_json(take(self.document, "model", dict)))

    @property
    def names(self) -> list[str]:
        """Of the corrected tensors, in the order of the file."""
        return [info.name for info in self.file.tensor_infos]

    @cached_property
    def keep(self) -> Keep:
        """bool (n_layer, n_expert): the experts that it was made for; rows of layers that do not route are True."""

        def read() -> Keep:
            keep = np.ones((self.model.n_layer, self.model.n_expert), dtype=np.bool_)
            rows = take(self.document, "keep", dict)
            for layer in self.model.moe_layers:
                keep[layer] = parse_row(take(rows, str(layer), str, "keep"), f"keep.{layer}", self.model.n_expert)
            return keep

        return self._read(read)

    @property
    def n_expert_used(self) -> int | None:
        """Experts per token that it was made for, where that is not the model's own number."""
        used: int | None = self.document.get("n_expert_used")
        return used

    def check(self, model: ModelIdentity, keep: Keep, n_expert_used: int | None) -> None:
        """Raise a `MoeshardError` where it was made for another model, other experts, or others per token."""
        path = self.file.path
        if not self.model.is_same(model):
            raise MoeshardError(
                f"{path}: was made for the model {self.model}, but this one is {model}; make a recovery for this one"
            )
        layers = model.moe_layers
        if not np.array_equal(self.keep[layers], np.asarray(keep)[layers]):
            raise MoeshardError(f"{path}: was made for other experts than these; make a recovery for this keep or plan")
        if (self.n_expert_used or None) != (n_expert_used or None):
            raise MoeshardError(
                f"{path}: was made for {_used(self.n_expert_used)}, not for {_used(n_expert_used)}; make it again"
            )

    def note(self) -> tuple[str, str]:
        """Return what a shard says of it: names and SHA-256 of the corrected tensors, and what they were made from."""
        made = {key: self.document[key] for key in ("node", "parts", "texts", "made") if key in self.document}
        return NOTE, json.dumps({"tensors": {name: digest(self.file, name) for name in self.names}, **made})

    def _read(self, read: Callable[[], _T]) -> _T:
        try:
            return read()
        except MoeshardError as error:
            raise MoeshardError(f"recovery '{self.file.path}': {error}") from error


def open_corrections(path: str | os.PathLike[str]) -> Corrections:
    """Open a recovery file.

    Raises:
        MoeshardError: it cannot be read, or is no recovery of a version that is known.
    """
    file = GGUFMap(path)
    text = file.metadata.get(KEY)
    if not isinstance(text, str):
        raise MoeshardError(f"{file.path}: is no recovery: it has no '{KEY}'; make one with moeshard recover")
    try:
        document = parse_document(text, "recovery")
        check_version(document, "moeshard_recovery", VERSION, "recovery")
    except MoeshardError as error:
        raise MoeshardError(f"recovery '{file.path}': {error}") from error
    return Corrections(file, document)


def write_corrections(
    path: str | os.PathLike[str],
    model: ModelIdentity,
    keep: Keep,
    tensors: list[tuple[str, str, tuple[int, ...], bytes]],
    facts: dict[str, Any],
    *,
    force: bool = False,
) -> None:
    """Write a recovery file.

    Args:
        path: of the file, which appears whole or not at all.
        model: that it is for, and
        keep: bool (n_layer, n_expert), the experts.
        tensors: (name, type, shape, bytes) each.
        facts: JSON values: what else it says.
        force: replace an existing file.
    """
    from moeshard.gguf.identity import model_to_json

    document = {
        "moeshard_recovery": VERSION,
        "model": model_to_json(model),
        "keep": {str(layer): format_row(keep[layer]) for layer in model.moe_layers},
        **facts,
    }
    entries = [("general.architecture", model.arch), ("general.type", "recovery"), (KEY, json.dumps(document))]
    _core.write_segments([_core.tensor_file(entries, tensors, os.fspath(path))], [os.fspath(path)], force=force)


def digest(file: GGUFMap, name: str) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(np.ascontiguousarray(file.tensors[name]).tobytes()).hexdigest()


def _used(n: int | None) -> str:
    return f"{n} experts per token" if n else "the model's own number of experts per token"
