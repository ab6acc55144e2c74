"""Names for the arrays that pass between rooms; each means the same everywhere. Shapes stand where they are used."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
"""Indices into other arrays."""
Counts = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int32]
"""Of experts; -1 where there is none."""
Tokens = npt.NDArray[np.int32]
TokensLike = npt.ArrayLike
"""What becomes `Tokens`: any one-dimensional array or sequence of integers."""
Rows = npt.NDArray[np.bool_]
"""bool (M, E): experts of M layers, as a keep without the layers that do not matter."""
