from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moeshard import _core


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> _core.Model:
    return _core.Model(str(tinymoe))


@pytest.fixture
def context(model: _core.Model) -> _core.Context:
    return _core.Context(model, n_ctx=1024, n_ubatch=32, n_threads=1)


@pytest.fixture(scope="module")
def tokens(model: _core.Model) -> npt.NDArray[np.int32]:
    """Return enough tokens for several micro-batches of `context`."""
    text = "Objects may be collected in any order, and what they handed out stays valid. "
    return np.tile(model.tokenize(text), 20)[:300].astype(np.int32)
