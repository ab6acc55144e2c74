"""Fingerprints of models: equal for equal models, whatever their files are called and however they are divided.

A model of hundreds of gigabytes is not read for its name; it is sampled, in two halves:

- the *head*: SHA-256 of the metadata, the tensor directory and the first bytes of every tensor. It is the whole
  fingerprint in files of version 0.1, and sees of a layer's experts only the first.
- the *samples*: SHA-256 of bytes of every expert in every tensor, and from all over the other ones. Two fine-tunings
  differ in nearly all bytes of what was trained, be it a single expert.

A fingerprint is written ``HEAD.SAMPLES``. One without samples matches all models of its head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from moeshard._core import GGUFMap

HEAD_BYTES = 256
"""Of each tensor, in the head."""
SAMPLE_BYTES = 1024
"""Of each place that is sampled: reading it from a disk takes no longer than a single byte."""
DENSE_PLACES = 16
"""Of each tensor that does not depend on experts."""

_OF_FILES = "split."
_BETWEEN = "."
_SAMPLE_DIGITS = 32
# Places of neighbouring experts are spread over them as multiples of the golden ratio are over [0, 1): a change of a
# part of the rows of all experts is seen as well.
_GOLDEN = 0x9E3779B97F4A7C15


def fingerprint(model: GGUFMap) -> str:
    """Return the fingerprint of a model. Parts do not matter: in one file or in several it has the same one."""
    head, samples = hashlib.sha256(), hashlib.sha256()
    # Read, not looked at in the map: there, each look makes the kernel read megabytes around it. And read from what is
    # open, which need not be what has the name by now.
    parts = model.parts
    for key, (offset, size) in parts[0].entry_ranges.items():
        if not key.startswith(_OF_FILES):
            head.update(parts[0].read(offset, size))
    slices = {tensor.index: tensor.slice_bytes for tensor in model.moe_layout().tensors if tensor.axis >= 0}
    for index, info in enumerate(model.tensor_infos):
        part = parts[info.part]
        head.update(f"{info.name} {info.type} {info.shape}\n".encode("utf-8", "surrogateescape"))
        head.update(part.read(info.offset, min(HEAD_BYTES, info.nbytes)))
        for offset, size in places(info.nbytes, slices.get(index, 0)):
            samples.update(part.read(info.offset + offset, size))
    return head.hexdigest() + _BETWEEN + samples.hexdigest()[:_SAMPLE_DIGITS]


def same_fingerprint(a: str, b: str) -> bool:
    """Whether two fingerprints can be of one model; where one has no samples, its head alone decides."""
    if _BETWEEN in a and _BETWEEN in b:
        return a == b
    return a.partition(_BETWEEN)[0] == b.partition(_BETWEEN)[0]


def places(n_bytes: int, slice_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield offset and size of what is sampled of a tensor.

    Args:
        n_bytes: of the tensor.
        slice_bytes: of one expert; 0 for a tensor that does not depend on experts.
    """
    step = slice_bytes or -(-n_bytes // DENSE_PLACES)
    if step <= SAMPLE_BYTES:  # all of it
        yield from ((at, min(SAMPLE_BYTES, n_bytes - at)) for at in range(0, n_bytes, SAMPLE_BYTES))
        return
    for number, start in enumerate(range(0, n_bytes, step)):
        size = min(step, n_bytes - start)
        room = max(0, size - SAMPLE_BYTES)
        within = ((number + 1) * _GOLDEN % 2**64) * room >> 64
        yield start + within, min(SAMPLE_BYTES, size)
