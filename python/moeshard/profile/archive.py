"""What a profile's file holds: an ``.npz`` of version 3, and how versions 1 and 2 are read.

docs/plans.md describes version 3. Version 2 holds all arrays of a `Profile` as they are, version 1 all but `energy` and
`cosaliency`.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Counts, Floats
from moeshard.files.atomic import atomic_file
from moeshard.profile.packed import VALUES, Cells, Sequences, correlations, packed, products, squares, triangle

VERSION = 3
_PLAIN = ("layers", "domain", "n_tokens", "entropy", "peak")
_HALVES = {"mass": "mass", "saliency": "saliency_by_sequence", "energy": "energy_root"}
"""Of arrays of sequences in the file. Under `saliency` others look for one score per expert."""
_SCALES = {"mass": "mass_scale", "saliency": "saliency_scale", "energy": "energy_scale"}
_PIECE = 1 << 24


def write_archive(
    path: str | os.PathLike[str], head: str, ranking: npt.NDArray[Any], arrays: Mapping[str, Any], *, force: bool
) -> None:
    """Write the arrays of a profile, by name; they are handed on piece by piece, never all of them at once.

    Raises MoeshardError where the file cannot be written, or exists and `force` is False.
    """
    sequences = packed({name: arrays[name] for name in VALUES})
    with atomic_file(path, force=force) as file, zipfile.ZipFile(file, "w") as archive:
        _put(archive, "head", np.array(head))
        _put(archive, "saliency", ranking)
        for name in _PLAIN:
            _put(archive, name, arrays[name])
        _put(archive, "cells", sequences.cells.bits)
        _put_bytes(archive, "count", sequences.values["count"])
        for name, stored in _HALVES.items():
            _put_bytes(archive, stored, sequences.values[name])
        for name, stored in _SCALES.items():
            _put(archive, stored, sequences.scales[name])
        _put_pairs(archive, arrays["together"], arrays["cosaliency"])


def _put_pairs(archive: zipfile.ZipFile, together: Counts, cosaliency: Floats) -> None:
    domains, layers, n_expert = together.shape[:3]
    shape = (domains, layers, n_expert * (n_expert + 1) // 2)
    counts = np.empty(shape, dtype="<u2" if together.max(initial=0) < 1 << 16 else "<u4")
    for half, own in zip(counts, together, strict=True):
        half[:] = triangle(own)
    _put_bytes(archive, "together", counts)
    del counts
    units = np.empty(shape, dtype="<f2")
    diagonals = np.empty((domains, layers, n_expert), dtype=np.float32)
    for half, diagonal, own in zip(units, diagonals, cosaliency, strict=True):
        half[:], diagonal[:] = correlations(own)
    _put_bytes(archive, "correlation", units)
    _put(archive, "squares", diagonals)


def _put(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _put_bytes(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    """Write an array byte by byte."""
    width = array.dtype.itemsize
    each = array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
    for place in range(width):
        plane = each[place::width]
        if place == 0 and array.dtype.kind == "f":
            _put(archive, f"{name}.{place}", plane)
        else:
            _put(archive, f"{name}.{place}.z", _compressed(plane))


def _compressed(plane: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    # Bytes repeat, sequences of bytes hardly: to look for those takes long and misleads.
    stream = zlib.compressobj(1, strategy=zlib.Z_RLE)
    parts = [stream.compress(plane[at : at + _PIECE].tobytes()) for at in range(0, plane.size, _PIECE)]
    return np.frombuffer(b"".join([*parts, stream.flush()]), dtype=np.uint8)


def _bytes(file: Mapping[str, Any], name: str, kind: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """What `_put_bytes` wrote, of so many values; `kind` is ``u`` or ``f``."""
    width = 2 if kind == "f" or f"{name}.2.z" not in file else 4
    found = np.empty((math.prod(shape), width), dtype=np.uint8)
    for place in range(width):
        if place == 0 and kind == "f":
            plane = file[f"{name}.{place}"]
        else:
            stream = zlib.decompressobj()
            plane = np.frombuffer(stream.decompress(file[f"{name}.{place}.z"], len(found) + 1), dtype=np.uint8)
            if not stream.eof:
                raise ValueError(f"'{name}' is not whole, or too long")
        if plane.dtype != np.uint8 or plane.shape != (len(found),):
            raise ValueError(f"'{name}' has {plane.size} values, not {len(found)}")
        found[:, place] = plane
    return _finite(name, found.view(f"<{kind}{width}").reshape(shape))


def from_archive(file: Mapping[str, Any], version: int, n_expert: int) -> dict[str, Any]:
    """Return the arrays of a profile, by name, from those of a file.

    Raises ValueError or KeyError where it is damaged.
    """
    if version < VERSION:
        arrays = {name: file[name] for name in (*_PLAIN, "count", "mass", "together")}
        arrays["saliency"] = file[_HALVES["saliency"]]
        if version > 1:
            return {**arrays, "energy": file["energy"], "cosaliency": file["cosaliency"]}
        energy = _least_energy(arrays)
        return {**arrays, "energy": energy, "cosaliency": _likely_products(arrays, energy)}
    arrays = {name: file[name] for name in _PLAIN}
    sequences = _sequences(file, arrays["layers"].size, n_expert)
    arrays |= {name: sequences.array(name) for name in VALUES}
    return arrays | _pairs(file, n_expert)


def _sequences(file: Mapping[str, Any], n_rows: int, n_expert: int) -> Sequences:
    bits = file["cells"]
    if bits.dtype != np.uint8 or bits.ndim != 2 or bits.shape[1] != -(-n_rows * n_expert // 8):
        raise ValueError(f"'cells' is {bits.dtype} {bits.shape}")
    cells = Cells.of(bits, n_rows, n_expert)
    n = int(cells.ends[-1]) if len(bits) else 0
    values = {"count": _bytes(file, "count", "u", (n,))}
    values |= {name: _bytes(file, stored, "f", (n,)) for name, stored in _HALVES.items()}
    scales = {name: _checked(file, stored, "f", (len(bits), n_rows)) for name, stored in _SCALES.items()}
    return Sequences(cells, values, scales)


def _pairs(file: Mapping[str, Any], n_expert: int) -> dict[str, npt.NDArray[Any]]:
    diagonal = file["squares"]
    shape = (*diagonal.shape[:2], n_expert * (n_expert + 1) // 2)
    _checked(file, "squares", "f", (*shape[:2], n_expert))
    counts = _bytes(file, "together", "u", shape)
    together = np.empty((*diagonal.shape, n_expert), dtype=np.int32)
    for own, half in zip(together, counts, strict=True):
        own[:] = squares(half, n_expert)
    del counts
    units = _bytes(file, "correlation", "f", shape)
    cosaliency = np.empty((*diagonal.shape, n_expert), dtype=np.float32)
    for own, half, sums in zip(cosaliency, units, diagonal, strict=True):
        own[:] = products(half, sums)
    return {"together": together, "cosaliency": cosaliency}


def _checked(file: Mapping[str, Any], name: str, kind: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = file[name]
    if array.dtype.kind != kind or array.shape != shape:
        raise ValueError(f"'{name}' is {array.dtype} {array.shape}, not {shape}")
    return _finite(name, array)


def _finite(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    flat = array.reshape(-1)
    if not all(np.isfinite(flat[at : at + _PIECE]).all() for at in range(0, flat.size, _PIECE)):
        raise ValueError(f"'{name}' holds values that are not finite")
    return array


def _least_energy(arrays: Mapping[str, npt.NDArray[Any]]) -> Floats:
    """What version 1 does not hold: the sums of squares, as if an expert contributed equally to each of its tokens."""
    energy: Floats = arrays["saliency"].astype(np.float32) ** 2 / np.maximum(arrays["count"], 1)
    return energy.astype(np.float32)


def _likely_products(arrays: Mapping[str, npt.NDArray[Any]], energy: Floats) -> Floats:
    """The sums of products, by how many tokens chose both experts and what each contributes to one of its own."""
    together = arrays["together"]
    found = np.zeros(together.shape, dtype=np.float32)
    for domain, own in enumerate(found):
        chosen = arrays["domain"] == domain
        sums = energy[chosen].sum(axis=0)
        each = np.sqrt(sums / np.maximum(arrays["count"][chosen].sum(axis=0), 1))
        own[:] = together[domain] * each[:, :, None] * each[:, None, :]
        np.einsum("mee->me", own)[:] = sums
    return found
