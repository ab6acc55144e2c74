"""Ridge regression from its normal equations: at once, or block by block where they are too large for that."""

from __future__ import annotations

import numpy as np

from moeshard.recovery.moments import Matrix, Moments, block_rows

AT_ONCE = 8192
"""Features that are solved for at once; more are taken in blocks of at most as many."""
SWEEPS = 4


def ridge_solution(
    moments: Moments, ridge: float, *, at_once: int = AT_ONCE, sweeps: int = SWEEPS, start: Matrix | None = None
) -> Matrix:
    """Return the correction (features, n_embd) that minimises the squared error plus the ridge times its square.

    Args:
        moments: of a layer.
        ridge: in units of `Moments.scale`.
        at_once: features that are solved for at once. More are solved for in blocks of whole experts, each given the
            others as they stand (block Gauss-Seidel), which needs no copy of the whole system.
        sweeps: over the blocks.
        start: a solution to begin the sweeps with.
    """
    added = ridge * moments.scale
    blocks = block_rows(moments.n_expert, moments.n_ff, at_once)
    if len(blocks) == 1:
        found: Matrix = np.linalg.solve(_held(moments.gram, added), moments.cross)
        return found
    inverses = [np.linalg.inv(_held(moments.gram[rows, rows], added)) for rows in blocks]
    found = np.zeros_like(moments.cross) if start is None else start.copy()
    for _ in range(sweeps):
        for rows, inverse in zip(blocks, inverses, strict=True):
            own = moments.gram[rows]
            left = moments.cross[rows] - own @ found + own[:, rows] @ found[rows]
            found[rows] = inverse @ left
    return found


def _held(gram: Matrix, added: float) -> Matrix:
    held = gram.copy()
    held[np.diag_indices_from(held)] += added
    return held
