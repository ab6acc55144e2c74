"""How many of a node's experts each layer gets, where it need not be equally many: chosen by scores. Pure functions."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from moeshard.profile.record import Doubles

Rows = npt.NDArray[np.bool_]


class Chooser(Protocol):
    """Chooses a node's experts by scores (M, E): `size` in each layer, or on average; protected ones first."""

    def __call__(self, scores: Doubles, size: int, protected: Rows | None = None) -> Rows: ...


def across_layers(scores: Doubles, size: int, protected: Rows | None = None, *, fewest: int = 1) -> Rows:
    """Return bool (M, E): `size` experts per layer on average, more of them in layers that need more.

    Every layer holds its `fewest` best. All other places go, over all layers, to the experts with the largest share of
    their layer's score: no other choice of as many experts captures a larger sum of shares. Of equal shares, those of
    lower layers and ids come first.

    Args:
        scores: float (M, E), or flat, where `protected` gives the shape.
        size: experts per layer; M times as many are held.
        protected: bool (M, E): experts that come before all others.
        fewest: experts that each layer holds at least: as many as a token uses.
    """
    rows = scores if protected is None else scores.reshape(protected.shape)
    shares = rows / np.maximum(rows.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    if protected is not None:
        shares = np.where(protected, np.inf, shares)
    keep = np.zeros(shares.shape, dtype=bool)
    np.put_along_axis(keep, np.argsort(-shares, axis=1, kind="stable")[:, :fewest], True, axis=1)
    open_places = size * len(shares) - int(keep.sum())
    rest = np.where(keep, -np.inf, shares).ravel()
    keep.reshape(-1)[np.argsort(-rest, kind="stable")[:open_places]] = True
    return keep
