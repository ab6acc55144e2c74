"""The fit of one layer: from sums over its tokens to corrected down projections in the type of the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeshardError
from moeshard.arrays import Floats
from moeshard.recovery.moments import Matrix, Moments, Sample, gains
from moeshard.recovery.solve import ridge_solution

RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Tried, in units of the mean square of a feature."""
GAIN_RIDGE = 0.02
DOWN, GAIN = "down", "gain"


@dataclass(frozen=True, eq=False)
class Projections:
    """The down projections of a layer's kept experts, as the model has them."""

    name: str
    """Of the tensor."""
    type: str
    values: Floats
    """float32 (E, n_embd, n_ff)."""
    scale: Floats
    """float32 (E,): what the file multiplies each expert's output by besides."""

    @property
    def rows(self) -> Floats:
        """float32 (E · n_ff, n_embd): as a correction is laid out."""
        e, d, f = self.values.shape
        return np.ascontiguousarray(self.values.transpose(0, 2, 1)).reshape(e * f, d)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A layer's corrected down projections."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: bytes
    ridge: float | None
    """That the held-out text chose; None where only gains were fitted."""
    explained: float
    """Part of what the stream lacked that is lacking no more, by the sample."""


def read_projections(model: GGUFMap, layer: int, kept: Sequence[int]) -> Projections:
    """Read the down projections of some experts.

    Raises:
        MoeshardError: the layer has none that are known how to correct.
    """
    name = f"blk.{layer}.ffn_down_exps.weight"
    info = next((info for info in model.tensor_infos if info.name == name), None)
    if info is None or len(info.shape) != 3:
        raise MoeshardError(f"{model.path}: layer {layer} has no tensor '{name}', so its experts cannot be corrected")
    _, rows, n = info.shape
    values = [_core.dequantize(info.type, _bytes(model, layer, expert), rows * n).reshape(rows, n) for expert in kept]
    scale = np.ones(len(kept), dtype=np.float32)
    scales = model.tensors.get(f"blk.{layer}.ffn_down_exps.scale")
    if scales is not None:
        scale = np.asarray(scales, dtype=np.float32).reshape(-1)[list(kept)]
    return Projections(name, info.type, np.stack(values), scale)


def foreign_corrections(moments: Moments, ridges: Sequence[float]) -> dict[float, Matrix]:
    """Return the correction by each ridge that some of the text alone gives, to be judged on text of other kinds."""
    moments.mirror()
    found: dict[float, Matrix] = {}
    previous: Matrix | None = None
    for ridge in sorted(ridges, reverse=True):
        previous = ridge_solution(moments, ridge, start=previous)
        found[ridge] = previous.astype(np.float32)
    return found


def harmless(corrections: dict[float, Matrix], foreign: Sample) -> list[float]:
    """Return the ridges whose corrections leave text of other kinds no worse off than it was."""
    before = foreign.error()
    return [ridge for ridge, correction in corrections.items() if foreign.error(correction) <= before]


def fit_layer(
    own: Projections,
    moments: Moments,
    sample: Sample,
    *,
    parts: Sequence[str],
    kind: str,
    ridges: Sequence[float],
) -> Fitted | None:
    """Fit the down projections of a layer; None where that does not help on the sample.

    Args:
        own: the projections as they are.
        moments: of the text that is fitted to.
        sample: of other text: what the ridge is chosen by, and whether anything is changed.
        parts: `DOWN`, `GAIN` or both.
        kind: ggml's name of the type to write.
        ridges: to choose from.
    """
    before = sample.error()
    found: list[tuple[float, float | None, bytes]] = []
    corrections: list[tuple[float | None, Matrix]] = [(None, np.zeros_like(moments.cross))]
    if DOWN in parts:
        previous: Matrix | None = None
        best = before
        for tried in sorted(ridges, reverse=True):
            previous = ridge_solution(moments, tried, start=previous)
            error = sample.error(previous)
            if error < best:
                best, corrections = error, [(tried, previous)]
    for ridge, correction in corrections:
        if ridge is None and GAIN not in parts:
            return None
        found += _written(own, moments, sample, correction, ridge, kind, GAIN in parts)
    error, ridge, data = min(found, key=lambda one: one[0])
    if not error < before:
        return None
    return Fitted(own.name, kind, own.values.shape, data, ridge, 1 - error / before)


def _written(
    own: Projections,
    moments: Moments,
    sample: Sample,
    correction: Matrix,
    ridge: float | None,
    kind: str,
    with_gains: bool,
) -> list[tuple[float, float | None, bytes]]:
    """Return (error on the sample, ridge, bytes) of corrected projections in their type, without and with gains."""
    original = own.rows
    wanted = original + correction.astype(np.float32)
    found: list[tuple[float, float | None, bytes]] = []
    data, written = _quantised(own, moments, wanted, kind)
    if ridge is not None:
        found.append((sample.error(written - original), ridge, data))
    if with_gains:
        # Multiplying what is rounded is as good as rounding what is multiplied: scales of blocks take a gain up.
        gain = gains(moments, original, written, GAIN_RIDGE)
        wanted = wanted * np.repeat(gain, moments.n_ff).astype(np.float32)[:, None]
        data, written = _quantised(own, moments, wanted, kind)
        found.append((sample.error(written - original), ridge, data))
    return found


def _quantised(own: Projections, moments: Moments, rows: Floats, kind: str) -> tuple[bytes, Floats]:
    """Return projections (E · n_ff, n_embd) in the type of the file, and what they are then."""
    e, d, f = own.values.shape
    values = rows.reshape(e, f, d).transpose(0, 2, 1)
    parts = [
        _core.quantize(kind, np.ascontiguousarray(values[expert]), moments.importance(expert)) for expert in range(e)
    ]
    read = np.stack([_core.dequantize(kind, np.frombuffer(part, np.uint8), d * f).reshape(d, f) for part in parts])
    return b"".join(parts), np.ascontiguousarray(read.transpose(0, 2, 1)).reshape(e * f, d)


def _bytes(model: GGUFMap, layer: int, expert: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(np.ascontiguousarray(model.expert(layer, "ffn_down_exps", expert)).tobytes(), np.uint8)
