"""Arrays (S, M, E) and (M, E, E) in little room: only the cells that hold something, their values rounded to float16.

A sequence chooses a part of a layer's experts, and what it adds up for each scatters by far more than float16 rounds: a
value keeps 11 significant bits. Values are held in units of a power of two that no value of their row (a sequence in a
layer) exceeds, so that taking them out again rounds nothing and packing them once more changes nothing. Of squares the
roots are held, which need half the range.

With h a value, H the largest of its row: the error is at most h / 2048 (h / 1024 of squares), or where h is less than
H / 2**13, H / 2**24 (less of squares). A share of a row's sum, such as what a keep captures, is thus off by less than
1 / 1024 + E / 2**23, or 1 / 512 + E / 2**23 of squares; in practice by far less, since errors have either sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Floats, Ints

Halves = npt.NDArray[np.float16]

VALUES = ("count", "mass", "saliency", "energy")
"""What is held of each sequence, layer and expert; of `energy`, which are squares, the roots."""
_SQUARES = "energy"
_COUNTS = "count"
_BLOCK = 64
"""Sequences that are packed or taken out at once, where it makes no difference."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Which cells of (S, M, E) hold something."""

    bits: npt.NDArray[np.uint8]
    """uint8 (S, ceil(M * E / 8)): a bit per cell, the first in the highest place."""
    ends: Ints
    """int (S,): how many cells that hold something precede the end of each sequence."""
    shape: tuple[int, int, int]

    @staticmethod
    def of(bits: npt.NDArray[np.uint8], n_rows: int, n_expert: int) -> Cells:
        """Count the cells of each sequence."""
        ends = np.empty(len(bits), dtype=np.int64)
        total = 0
        for at in range(0, len(bits), _BLOCK):
            counts = np.unpackbits(bits[at : at + _BLOCK], axis=1).sum(axis=1, dtype=np.int64)
            ends[at : at + _BLOCK] = total + np.cumsum(counts)
            total += int(counts.sum())
        return Cells(bits, ends, (len(bits), n_rows, n_expert))

    def held(self, sequences: Ints) -> npt.NDArray[np.bool_]:
        """Return bool (n, M, E)."""
        _, m, e = self.shape
        found: npt.NDArray[np.bool_] = np.unpackbits(self.bits[sequences], axis=1, count=m * e).view(np.bool_)
        return found.reshape(-1, m, e)

    def span(self, sequence: int) -> slice:
        """Where the values of a sequence are."""
        return slice(int(self.ends[sequence - 1]) if sequence else 0, int(self.ends[sequence]))


class Packed(np.lib.mixins.NDArrayOperatorsMixin):
    """One array (S, M, E), int32 or float32, that is taken out of its packing where it is looked at.

    It is read as any array of NumPy's: ``packed[sequences]`` takes out some sequences, and everything else all of it.
    """

    def __init__(self, cells: Cells, values: npt.NDArray[Any], scales: Floats | None, squares: bool = False):
        self.cells = cells
        self.values = values
        """float16 (n,) of the cells that hold something, in their order; or unsigned integers (n,)."""
        self.scales = scales
        """float32 (S, M): units of the values; None of integers, which are held as they are."""
        self.squares = squares

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.cells.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int32 if self.scales is None else np.float32)

    ndim = 3

    def rows(self, sequences: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        """Return (n, M, E): what some sequences (indices) hold."""
        chosen = np.atleast_1d(np.asarray(sequences, dtype=np.int64))
        out = np.zeros((chosen.size, *self.shape[1:]), dtype=self.dtype if dtype is None else dtype)
        for at in range(0, chosen.size, _BLOCK):
            some = chosen[at : at + _BLOCK]
            block = out[at : at + _BLOCK]
            if some.size:
                block[self.cells.held(some)] = np.concatenate([self.values[self.cells.span(int(i))] for i in some])
            if self.scales is not None:
                block *= self.scales[some, :, None]
            if self.squares:
                np.square(block, out=block)
        return out

    def sum(self, axis: Any = None, dtype: npt.DTypeLike | None = None, **options: Any) -> Any:
        """As an array's; over sequences a few at a time."""
        if axis != 0 or options:
            return np.asarray(self).sum(axis=axis, dtype=dtype, **options)
        kind = np.zeros(0, dtype=self.dtype).sum(dtype=dtype).dtype
        total = np.zeros(self.shape[1:], dtype=np.float64 if kind.kind == "f" else kind)
        for at in range(0, len(self), _BLOCK):
            total += self.rows(np.arange(at, min(at + _BLOCK, len(self)))).sum(axis=0, dtype=total.dtype)
        return total.astype(kind)

    def __getitem__(self, index: Any) -> Any:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is Ellipsis or first is None:
            return np.asarray(self)[index]
        sequences = np.arange(self.shape[0])[first]
        found = self.rows(sequences)
        found = found[0] if np.ndim(sequences) == 0 else found
        return found[tuple(rest) if np.ndim(sequences) == 0 else (slice(None), *rest)] if rest else found

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        for at in range(0, len(self), _BLOCK):
            yield from self.rows(np.arange(at, min(at + _BLOCK, len(self))))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.rows(np.arange(len(self)), dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(*(np.asarray(x) if isinstance(x, Packed) else x for x in inputs), **options)

    def __getattr__(self, name: str) -> Any:
        # Whatever else an array does, such as `sum`, the array itself does.
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"an array has no attribute '{name}'")
        return getattr(np.asarray(self), name)

    def regrouped(self, groups: int, cells: Cells) -> Packed:
        """The same with each of so many groups of experts as a row of its own; `cells` of that shape."""
        scales = None if self.scales is None else np.repeat(self.scales, groups, axis=1)
        return Packed(cells, self.values, scales, self.squares)


@dataclass(frozen=True, eq=False)
class Sequences:
    """All that is held of each sequence, layer and expert."""

    cells: Cells
    values: dict[str, npt.NDArray[Any]]
    """By each of `VALUES`: unsigned integers or float16 (n,), of the cells that hold something."""
    scales: dict[str, Floats]
    """float32 (S, M), of those that are float16."""

    def array(self, name: str) -> Packed:
        return Packed(self.cells, self.values[name], self.scales.get(name), name == _SQUARES)


def pack(arrays: Mapping[str, npt.NDArray[Any]]) -> Sequences:
    """Pack arrays (S, M, E), by the names of `VALUES`; cells that are 0 in all of them are not held."""
    held = np.logical_or.reduce([arrays[name] != 0 for name in VALUES])
    s, m, e = held.shape
    cells = Cells.of(np.packbits(held.reshape(s, m * e), axis=1), m, e)
    values: dict[str, npt.NDArray[Any]] = {}
    scales: dict[str, Floats] = {}
    for name in VALUES:
        array = np.asarray(arrays[name])
        if array.dtype.kind == "i":
            values[name] = array[held].astype(np.uint16 if array.max(initial=0) < 1 << 16 else np.uint32)
            continue
        array = (np.sqrt(array) if name == _SQUARES else array).astype(np.float32)
        scales[name] = _scales(array)
        values[name] = (array / scales[name][:, :, None])[held].astype(np.float16)
    return Sequences(cells, values, scales)


def _scales(array: Floats) -> Floats:
    """The least power of two that is no less than the largest value of each row; 1 of rows of zeros."""
    largest, exponents = np.frexp(np.abs(array).max(axis=-1, initial=0))
    exponents = np.where(largest == 0.5, exponents - 1, exponents)  # a power of two
    # Neither the scale nor its inverse may leave the range of float32.
    scales: Floats = np.ldexp(np.float32(1), np.clip(exponents, -120, 126))
    return scales


class Room:
    """Room for S sequences of M layers and E experts that are entered one after the other.

    It is laid out for all cells (or `capacity`), and what is not entered yet takes address space, but no memory:
    nothing is ever moved, and all is there once.
    """

    def __init__(self, shape: tuple[int, int, int], capacity: int | None = None):
        s, m, e = self._shape = shape
        n = s * m * e if capacity is None else capacity
        self.n = 0
        """Sequences that have been entered."""
        self._bits = np.empty((s, -(-m * e // 8)), dtype=np.uint8)
        self._ends = np.zeros(s + 1, dtype=np.int64)
        self._values = {name: np.empty(n, dtype=np.uint16 if name == _COUNTS else np.float16) for name in VALUES}
        self._scales = {name: np.empty((s, m), dtype=np.float32) for name in VALUES if name != _COUNTS}

    def add(self, part: Sequences) -> None:
        new = slice(self.n, self.n + len(part.cells.bits))
        start = self._ends[self.n]
        self._bits[new] = part.cells.bits
        self._ends[new.start + 1 : new.stop + 1] = start + part.cells.ends
        self.n = new.stop
        if part.values[_COUNTS].dtype.itemsize > self._values[_COUNTS].dtype.itemsize:
            self._values[_COUNTS] = self._values[_COUNTS].astype(part.values[_COUNTS].dtype)
        for name, values in part.values.items():
            self._values[name][start : start + values.size] = values
        for name, scales in part.scales.items():
            self._scales[name][new] = scales

    def since(self, first: int = 0) -> Sequences:
        """Return the sequences that have been entered, from one of them on; they are not copied."""
        own = slice(first, self.n)
        start, stop = int(self._ends[first]), int(self._ends[self.n])
        cells = Cells(self._bits[own], self._ends[first + 1 : self.n + 1] - start, (self.n - first, *self._shape[1:]))
        values = {name: array[start:stop] for name, array in self._values.items()}
        return Sequences(cells, values, {name: scales[own] for name, scales in self._scales.items()})


def extended(sequences: Sequences, n: int) -> Sequences:
    """Return n sequences, of which these are the first, and the others hold nothing."""
    have, m, e = sequences.cells.shape
    more = ((0, n - have), (0, 0))
    ends = np.pad(sequences.cells.ends, more[0], constant_values=sequences.values[_COUNTS].size)
    cells = Cells(np.pad(sequences.cells.bits, more), ends, (n, m, e))
    scales = {name: np.pad(scale, more, constant_values=1) for name, scale in sequences.scales.items()}
    return Sequences(cells, sequences.values, scales)


def nothing(n: int, n_rows: int, n_expert: int) -> Sequences:
    """Return so many sequences that hold nothing."""
    return extended(Room((0, n_rows, n_expert)).since(), n)


def first(sequences: Sequences, n: int) -> Sequences:
    """Return the first so many sequences."""
    _, m, e = sequences.cells.shape
    end = int(sequences.cells.ends[n - 1]) if n else 0
    cells = Cells(sequences.cells.bits[:n], sequences.cells.ends[:n], (n, m, e))
    values = {name: array[:end] for name, array in sequences.values.items()}
    return Sequences(cells, values, {name: scale[:n] for name, scale in sequences.scales.items()})


def packed(arrays: Mapping[str, npt.NDArray[Any] | Packed]) -> Sequences:
    """Pack arrays, some of which may be packed already; all that were packed together stay as they are."""
    found = [array for array in arrays.values() if isinstance(array, Packed)]
    if len(found) == len(VALUES) and all(array.cells is found[0].cells for array in found):
        values = {name: array.values for name, array in zip(arrays, found, strict=True)}
        scales = {name: array.scales for name, array in zip(arrays, found, strict=True) if array.scales is not None}
        return Sequences(found[0].cells, values, scales)
    n, m, e = arrays["count"].shape
    room = Room((n, m, e))
    for at in range(0, n, _BLOCK):
        room.add(pack({name: array[at : at + _BLOCK] for name, array in arrays.items()}))
    return room.since()


def regrouped(arrays: Mapping[str, npt.NDArray[Any] | Packed], groups: int) -> dict[str, Any]:
    """Return the same arrays with each group of experts as a row of its own: (S, M * groups, E / groups)."""
    again: dict[int, Cells] = {}
    result: dict[str, Any] = {}
    for name, array in arrays.items():
        n, m, e = array.shape
        shape = (n, m * groups, e // groups)
        if isinstance(array, Packed):
            old = array.cells
            cells = again.setdefault(id(old), Cells(old.bits, old.ends, shape))
            result[name] = array.regrouped(groups, cells)
        else:
            result[name] = array.reshape(shape)
    return result


def triangle(pairs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return (M, E * (E + 1) / 2): the upper half, with the diagonal, of symmetric matrices (M, E, E)."""
    m, e, _ = pairs.shape
    rows, columns = np.triu_indices(e)
    found: npt.NDArray[Any] = pairs.reshape(m, -1).take(rows * e + columns, axis=1)
    return found


def squares(halves: npt.NDArray[Any], n_expert: int) -> npt.NDArray[Any]:
    """Return (M, E, E): the symmetric matrices whose upper halves these are."""
    rows, columns = np.triu_indices(n_expert)
    found = np.empty((len(halves), n_expert * n_expert), dtype=halves.dtype)
    found[:, rows * n_expert + columns] = halves
    found[:, columns * n_expert + rows] = halves
    return found.reshape(-1, n_expert, n_expert)


def correlations(products: Floats) -> tuple[Halves, Floats]:
    """Return sums of products (M, E, E) as float16 (M, E * (E + 1) / 2) of what their diagonal, float32 (M, E), allows.

    No product is larger than the root of its two squares; in units of that it is off by at most 1 / 2048 of itself, or
    2**-25 of the unit.
    """
    diagonal: Floats = np.einsum("mee->me", products).astype(np.float32)
    roots = np.sqrt(np.where(diagonal > 0, diagonal, 1))
    units = products / roots[:, :, None] / roots[:, None, :]
    return triangle(units).astype(np.float16), diagonal


def products(halves: Halves, diagonal: Floats) -> Floats:
    """Return float32 (M, E, E): the sums of products that `correlations` was given, rounded; the diagonal is exact."""
    n_expert = diagonal.shape[1]
    found: Floats = squares(halves.astype(np.float32), n_expert)
    roots = np.sqrt(np.where(diagonal > 0, diagonal, 1))
    found *= roots[:, :, None]
    found *= roots[:, None, :]
    found[:, np.arange(n_expert), np.arange(n_expert)] = diagonal
    return found


def rounded(profile_products: Floats) -> None:
    """Round sums of products (D, M, E, E) in place to what a file holds of them."""
    for own in profile_products:
        own[:] = products(*correlations(own))
