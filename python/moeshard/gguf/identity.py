"""Which model a file holds, whatever the file is called and into how many parts it is divided."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from moeshard._core import GGUFMap, MoeshardError
from moeshard.files.documents import check_other, expect, other_keys, take
from moeshard.files.text import readable
from moeshard.gguf.fingerprint import fingerprint, same_fingerprint
from moeshard.keep.text import expert_layers, format_ids

_OF_FILES = "split."
_MODEL_KEYS = ("name", "arch", "fingerprint", "n_layer", "n_expert", "moe_layers")
# Many times what any model has. A small file that claims more would take the memory of each node's keep.
_MAX_EXPERTS = 2**20


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a plan is for."""

    name: str
    """For people; two names may mean the same model."""
    arch: str
    fingerprint: str
    """See `moeshard.gguf.fingerprint.fingerprint`; compare with `is_same`, not by ``==``."""
    n_layer: int
    n_expert: int
    moe_layers: list[int]
    """The layers that route, ascending."""
    facts: dict[str, Any] = field(default_factory=dict, compare=False)
    """Whatever else a plan file says about its model: JSON values."""

    def is_same(self, other: ModelIdentity) -> bool:
        """Whether both are of one model, whatever it is called, as far as their fingerprints can tell."""
        return (
            same_fingerprint(self.fingerprint, other.fingerprint)
            and self.arch == other.arch
            and (self.n_layer, self.n_expert, self.moe_layers) == (other.n_layer, other.n_expert, other.moe_layers)
        )

    def __str__(self) -> str:
        """Describe the model by all that has to agree."""
        return (
            f"'{self.name}' ({self.arch}, {self.n_expert} experts in layers {format_ids(self.moe_layers)} of "
            f"{self.n_layer}, fingerprint {self.fingerprint})"
        )


def identify(model: GGUFMap) -> ModelIdentity:
    """Return what a plan says about the model it is for."""
    layout = model.moe_layout()
    name = model.metadata.get("general.name")
    return ModelIdentity(
        name=readable(name if isinstance(name, str) else os.path.basename(model.path)),
        arch=layout.arch,
        fingerprint=fingerprint(model),
        n_layer=layout.n_layer,
        n_expert=layout.n_expert,
        moe_layers=expert_layers(layout),
    )


def model_to_json(model: ModelIdentity) -> dict[str, Any]:
    """Return the object ``model`` of a plan file, or of another file that is about a model."""
    return {key: getattr(model, key) for key in _MODEL_KEYS} | model.facts


def model_from_json(value: dict[str, Any]) -> ModelIdentity:
    """Read what `model_to_json` wrote.

    Raises:
        MoeshardError: naming the key that is missing, of another type or out of range.
    """
    model = ModelIdentity(
        name=take(value, "name", str, "model"),
        arch=take(value, "arch", str, "model"),
        fingerprint=take(value, "fingerprint", str, "model"),
        n_layer=take(value, "n_layer", int, "model"),
        n_expert=take(value, "n_expert", int, "model"),
        moe_layers=[
            expect(layer, int, f"model.moe_layers[{index}]")
            for index, layer in enumerate(take(value, "moe_layers", list, "model"))
        ],
        facts=other_keys(value, _MODEL_KEYS),
    )
    # Before any node: their arrays are as large as the model says.
    check_model(model)
    return model


def check_model(model: ModelIdentity) -> None:
    for key, value in (("n_layer", model.n_layer), ("n_expert", model.n_expert)):
        if value < 1:
            raise MoeshardError(f"model.{key}: {value} is less than 1")
    if model.n_layer * model.n_expert > _MAX_EXPERTS:
        raise MoeshardError(
            f"model.n_expert: {model.n_expert} experts in each of {model.n_layer} layers are more than any model has"
        )
    layers = model.moe_layers
    if not layers:
        raise MoeshardError("model.moe_layers: is empty, but a plan is about layers that route")
    if layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < model.n_layer:
        raise MoeshardError(
            f"model.moe_layers: must be ascending layers from 0 to {model.n_layer - 1}, each once, got {layers}"
        )
    check_other(model.facts, _MODEL_KEYS, "model.facts")


def no_experts(path: str, identity: ModelIdentity) -> MoeshardError:
    """Return the error that says of a file without experts why it has none."""
    trunk = f"it is part of a model with {identity.n_expert} per layer, which are in other files"
    return MoeshardError(f"{path}: has no experts to take out: {trunk if identity.n_expert else 'it is a dense model'}")
