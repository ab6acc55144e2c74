"""What a profile's file holds: an ``.npz`` of version 3, and how versions 1 and 2 are read.

| array | is, in version 3 |
|---|---|
| `head` | JSON: version, model, domains, facts |
| `saliency` | float64 (n_layer, E): the ranking, for whoever wants no more |
| `layers`, `domain`, `n_tokens`, `entropy`, `peak` | as in `moeshard.profile.record.Profile` |
| `cells` | uint8 (S, ceil(M * E / 8)): a bit for each cell (S, M, E), 1 where the sequence chose the expert |
| `count` | uint16 or uint32 (n,): of the cells with a 1, in their order |
| `mass`, `saliency_by_sequence`, `energy_root` | float16 (n,), in units of `…_scale`, float32 (S, M) |
| `together` | uint16 or uint32 (D, M, E * (E + 1) / 2): upper halves of symmetric matrices, with the diagonal |
| `correlation` | float16, the same shape: of `cosaliency`, in units of the roots of both squares |
| `squares` | float32 (D, M, E): the diagonal of `cosaliency` |

Each float16 array is held as two of uint8, `….high` and `….low`: the high bytes, sign, exponent and first digits, are
much alike and are compressed; the low ones would not get smaller.

Version 2 holds all arrays of a `Profile` as they are, version 1 all but `energy` and `cosaliency`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
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
_BYTES = (".low", ".high")
_SCALES = {"mass": "mass_scale", "saliency": "saliency_scale", "energy": "energy_scale"}


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
        _put(archive, "count", sequences.values["count"], small=True)
        for name, stored in _HALVES.items():
            _put_halves(archive, stored, sequences.values[name].shape, [sequences.values[name]])
        for name, stored in _SCALES.items():
            _put(archive, stored, sequences.scales[name], small=True)
        _put_pairs(archive, arrays["together"], arrays["cosaliency"])


def _put_pairs(archive: zipfile.ZipFile, together: Counts, cosaliency: Floats) -> None:
    domains, layers, n_expert = together.shape[:3]
    shape = (domains, layers, n_expert * (n_expert + 1) // 2)
    kind = np.dtype("<u2" if together.max(initial=0) < 1 << 16 else "<u4")
    _put_parts(archive, "together", kind, shape, (triangle(own).astype(kind) for own in together), small=True)
    diagonals = np.empty((domains, layers, n_expert), dtype=np.float32)

    units = np.empty(shape, dtype=np.float16)
    for half, own, diagonal in zip(units, cosaliency, diagonals, strict=True):
        half[:], diagonal[:] = correlations(own)
    _put_halves(archive, "correlation", shape, units)
    _put(archive, "squares", diagonals)


def _put_halves(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], parts: Iterable[npt.NDArray[np.float16]]
) -> None:
    for index, suffix in enumerate(_BYTES):
        planes = (part.astype("<f2", copy=False).view(np.uint8)[..., index::2] for part in parts)
        _put_parts(archive, name + suffix, np.dtype(np.uint8), shape, planes, small=suffix == _BYTES[1])


def _halves(file: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    found = np.empty((*shape[:-1], 2 * shape[-1]), dtype=np.uint8)
    for index, suffix in enumerate(_BYTES):
        found[..., index::2] = _checked(file, name + suffix, "u", shape)
    halves: npt.NDArray[np.float16] = found.view("<f2")
    return _finite(name, halves)


def _put(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any], *, small: bool = False) -> None:
    _put_parts(archive, name, array.dtype, array.shape, [array], small=small)


def _put_parts(
    archive: zipfile.ZipFile,
    name: str,
    kind: np.dtype[Any],
    shape: tuple[int, ...],
    parts: Iterable[npt.NDArray[Any]],
    *,
    small: bool = False,
) -> None:
    """Write an array by its parts. Only what is `small`, mostly zeros, is compressed: elsewhere that gains little."""
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED
    info._compresslevel = 1  # type: ignore[attr-defined]
    with archive.open(info, "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for part in parts:
            member.write(np.ascontiguousarray(part).data)


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
    values = {"count": _checked(file, "count", "u", (n,))}
    values |= {name: _halves(file, stored, (n,)) for name, stored in _HALVES.items()}
    scales = {name: _checked(file, stored, "f", (len(bits), n_rows)) for name, stored in _SCALES.items()}
    return Sequences(cells, values, scales)


def _pairs(file: Mapping[str, Any], n_expert: int) -> dict[str, npt.NDArray[Any]]:
    diagonal = file["squares"]
    shape = (*diagonal.shape[:2], n_expert * (n_expert + 1) // 2)
    _checked(file, "squares", "f", (*shape[:2], n_expert))
    counts = _checked(file, "together", "u", shape)
    together = np.empty((*diagonal.shape, n_expert), dtype=np.int32)
    for own, half in zip(together, counts, strict=True):
        own[:] = squares(half, n_expert)
    del counts
    units = _halves(file, "correlation", shape)
    cosaliency = np.empty((*diagonal.shape, n_expert), dtype=np.float32)
    for own, half, sums in zip(cosaliency, units, diagonal, strict=True):
        own[:] = products(half, sums)
    return {"together": together, "cosaliency": cosaliency}


def _checked(file: Mapping[str, Any], name: str, kind: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = file[name]
    if array.dtype.kind != kind or array.shape != shape:
        raise ValueError(f"'{name}' is {array.dtype} {array.shape}, not {shape}")
    return _finite(name, array) if kind == "f" else array


def _finite(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # In pieces: what is not finite may be large.
    flat = array.reshape(-1)
    if not all(np.isfinite(flat[at : at + (1 << 22)]).all() for at in range(0, flat.size, 1 << 22)):
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
