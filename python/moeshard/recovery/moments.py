"""Least squares over the experts of one layer, without holding the text.

What a layer's kept experts add to the residual stream is linear in their down projections: the sum, over the experts
that a token chose, of weight · W · h, where h is what W is applied to. With all weighted h of a token in one row of
E · n_ff features (zeros for experts that it did not choose), a correction D (features, n_embd) of all projections is a
linear regression of what the stream lacks. Its normal equations are sums over tokens: memory does not grow with text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Doubles, Floats, Ids

_EXACT = 4096
"""Up to so many features sums are kept in double precision."""
Matrix = npt.NDArray[Any]
"""float32 or float64."""


class Moments:
    """Sums over tokens of products of features (E · n_ff), and of features and targets (n_embd)."""

    def __init__(self, n_expert: int, n_ff: int, n_embd: int):
        n = n_expert * n_ff
        kind = np.float64 if n <= _EXACT else np.float32
        self.n_expert, self.n_ff = n_expert, n_ff
        self.gram: Matrix = np.zeros((n, n), dtype=kind)
        self.cross: Matrix = np.zeros((n, n_embd), dtype=kind)
        self._earlier: Matrix | None = None
        self.chosen = np.zeros(n_expert, dtype=np.int64)
        """Tokens that chose each expert."""

    def add(self, ids: Ids, features: Floats, target: Floats, earlier: Floats | None = None) -> None:
        """Add n tokens.

        Args:
            ids: int (n, top_k): the chosen experts.
            features: float32 (n, top_k, n_ff): the weighted activations of each.
            target: float32 (n, n_embd): what the stream lacks.
            earlier: float32 (n, n_embd): what it lacks already after an earlier layer that will be corrected too.
        """
        n = ids.shape[0]
        dense = np.zeros((n, self.n_expert, self.n_ff), dtype=np.float32)
        dense[np.arange(n)[:, None], ids] = features
        flat = dense.reshape(n, -1)
        for expert in range(self.n_expert):
            rows = np.flatnonzero((ids == expert).any(axis=1))
            if not rows.size:
                continue
            self.chosen[expert] += rows.size
            begin, end = expert * self.n_ff, (expert + 1) * self.n_ff
            own = dense[rows, expert].T
            # The upper half: what lies below is the same, mirrored when it is used.
            self.gram[begin:end, begin:] += own @ flat[rows, begin:]
            self.cross[begin:end] += own @ target[rows]
            if earlier is not None:
                if self._earlier is None:
                    self._earlier = np.zeros_like(self.cross)
                self._earlier[begin:end] += own @ earlier[rows]

    def close(self, removed: float = 0.0) -> None:
        """Make the sums whole, once all tokens are added; `removed` is the part of `earlier` that lacks no more."""
        self.mirror()
        if self._earlier is not None:
            self.cross -= removed * self._earlier
            self._earlier = None

    def mirror(self) -> None:
        """Fill the lower half in: what was added so far can then be solved for, and more be added."""
        if self.gram.shape[0] <= _EXACT:
            lower = np.tril_indices(self.gram.shape[0], -1)
            self.gram[lower] = self.gram.T[lower]
            return
        for expert in range(self.n_expert):  # without a copy of it all
            begin, end = expert * self.n_ff, (expert + 1) * self.n_ff
            self.gram[end:, begin:end] = self.gram[begin:end, end:].T

    @property
    def scale(self) -> float:
        """Mean square of a feature, summed over tokens: the unit of ridges."""
        return float(np.diagonal(self.gram).mean(dtype=np.float64))

    def importance(self, expert: int) -> Floats:
        """Return float32 (n_ff,): how much an error in each column of an expert's projection counts."""
        begin = expert * self.n_ff
        squares = np.diagonal(self.gram)[begin : begin + self.n_ff].astype(np.float32)
        # A column that no token used counts a little, so that it is not rounded to anything.
        result: Floats = np.maximum(squares, max(float(squares.mean()) * 1e-3, 1e-12))
        return result


def block_rows(n_expert: int, n_ff: int, most: int) -> list[slice]:
    """Divide the features into blocks of whole experts, of at most `most` features where an expert has no more."""
    per_block = max(1, most // n_ff)
    return [slice(first * n_ff, min(first + per_block, n_expert) * n_ff) for first in range(0, n_expert, per_block)]


@dataclass
class Sample:
    """Tokens that are held, to judge corrections by."""

    most: int
    """Tokens held at most; further ones are passed over."""
    ids: list[Ids] = field(default_factory=list)
    features: list[Floats] = field(default_factory=list)
    target: list[Floats] = field(default_factory=list)
    earlier: list[Floats] = field(default_factory=list)
    n: int = 0

    def add(self, ids: Ids, features: Floats, target: Floats, earlier: Floats | None = None) -> None:
        """Add tokens; see `Moments.add`."""
        room = self.most - self.n
        if room <= 0:
            return
        self.ids.append(ids[:room].copy())
        self.features.append(features[:room].copy())
        self.target.append(target[:room].copy())
        if earlier is not None:
            self.earlier.append(earlier[:room].copy())
        self.n += len(self.ids[-1])

    def close(self, removed: float = 0.0) -> None:
        """See `Moments.close`."""
        for target, earlier in zip(self.target, self.earlier, strict=False):
            target -= np.float32(removed) * earlier
        self.earlier.clear()

    def error(self, correction: Matrix | None = None) -> float:
        """Return the mean over tokens of the squared distance of the stream from its target, corrected or as it is."""
        total = 0.0
        for ids, features, target in zip(self.ids, self.features, self.target, strict=True):
            left = target if correction is None else target - apply(correction, ids, features)
            total += float(np.square(left, dtype=np.float64).sum())
        return total / max(self.n, 1)


def apply(correction: Matrix, ids: Ids, features: Floats) -> Floats:
    """Return float32 (n, n_embd): what a correction (E · n_ff, n_embd) adds to the stream of each token."""
    n_ff = features.shape[2]
    added = np.zeros((ids.shape[0], correction.shape[1]), dtype=np.float32)
    for expert in np.unique(ids):
        tokens, slots = np.nonzero(ids == expert)
        own = correction[expert * n_ff : (expert + 1) * n_ff].astype(np.float32)
        added[tokens] += features[tokens, slots] @ own  # a token chooses an expert once
    return added


def gains(moments: Moments, original: Matrix, projection: Matrix, ridge: float) -> Doubles:
    """Return float64 (E,): what to multiply each expert's projection by, so that the stream lacks least.

    Args:
        moments: of the layer.
        original, projection: (E · n_ff, n_embd): the projections that targets were measured with, and those that get
            the gains.
        ridge: how strongly gains are held at 1, in units of the mean square of an expert's output.
    """
    n, n_ff = moments.n_expert, moments.n_ff
    wide = projection.astype(moments.gram.dtype)
    # What the gained outputs have to add up to: what was lacking, and what the original projections added.
    wanted = moments.cross + moments.gram @ original.astype(moments.gram.dtype)
    seen = np.zeros((n, n))
    for expert in range(n):
        rows = slice(expert * n_ff, (expert + 1) * n_ff)
        product = (moments.gram[:, rows] @ wide[rows]) * wide
        seen[:, expert] = product.reshape(n, -1).sum(axis=1)
    right = (wanted * wide).reshape(n, -1).sum(axis=1).astype(np.float64)
    held = ridge * max(float(np.trace(seen)) / n, np.finfo(np.float64).tiny)
    found: Doubles = np.linalg.solve(seen + held * np.eye(n), right + held)
    return found
