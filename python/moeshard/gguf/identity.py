"""Which model a file holds, whatever the file is called and into how many parts it is divided."""

from __future__ import annotations

import hashlib
import os

from moeshard._core import GGUFMap
from moeshard.keep.text import expert_layers
from moeshard.planning.plan import ModelIdentity

# Of each tensor so many bytes are looked at: two fine-tunings of one model differ in nearly all of them, and a model of
# hundreds of gigabytes is not read for its name.
SAMPLE_BYTES = 256
_OF_FILES = "split."


def fingerprint(model: GGUFMap) -> str:
    """Return SHA-256, in hex, of the metadata, the tensor directory and the first bytes of every tensor.

    Parts do not matter: the same model in one file or in several has one fingerprint.
    """
    digest = hashlib.sha256()
    # Read, not looked at in the map: there, each look makes the kernel read megabytes around it. And read from what is
    # open, which need not be what has the name by now.
    parts = model.parts
    for key, (offset, size) in parts[0].entry_ranges.items():
        if not key.startswith(_OF_FILES):
            digest.update(parts[0].read(offset, size))
    for info in model.tensor_infos:
        digest.update(f"{info.name} {info.type} {info.shape}\n".encode())
        digest.update(parts[info.part].read(info.offset, min(SAMPLE_BYTES, info.nbytes)))
    return digest.hexdigest()


def identify(model: GGUFMap) -> ModelIdentity:
    """Return what a plan says about the model it is for."""
    layout = model.moe_layout()
    name = model.metadata.get("general.name")
    return ModelIdentity(
        name=name if isinstance(name, str) else os.path.basename(model.path),
        arch=layout.arch,
        fingerprint=fingerprint(model),
        n_layer=layout.n_layer,
        n_expert=layout.n_expert,
        moe_layers=expert_layers(layout),
    )
