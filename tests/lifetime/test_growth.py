"""Memory does not grow with the number of models that were loaded and freed."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from moeshard import _core

CYCLES = 1000
WARM_UP = 100
# What the allocator keeps back varies by this much; one leaked context alone would be 100 kB in every cycle.
SLACK = 4 << 20

# Sanitizers keep freed memory back for a while, on purpose.
pytestmark = pytest.mark.skipif("MOESHARD_TEST_CORE" in os.environ, reason="memory is held back by the sanitizer")


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def growth(cycle: Callable[[], object]) -> int:
    """Return by how many bytes the process grew over the cycles, those of the warm-up left out."""
    for _ in range(WARM_UP):
        cycle()
    before = resident()
    for _ in range(CYCLES):
        cycle()
    return resident() - before


def test_load_and_free(tinymoe: Path) -> None:
    def cycle() -> None:
        model = _core.Model(str(tinymoe))
        context = _core.Context(model, n_ctx=32, n_batch=32, n_threads=1)
        keep = np.ones((model.routing.n_layer, model.routing.n_expert), np.bool_)
        context.set_keep(keep)
        context.decode([(0, [1, 2])])
        context.trace([(0, [3])], lambda *_: None)

    assert growth(cycle) < SLACK


def test_contexts(model: _core.Model) -> None:
    def cycle() -> None:
        context = _core.Context(model, n_ctx=32, n_batch=32, n_threads=1)
        assert len(b"".join(_core.Generation(context, [1, 2], max_tokens=2, ignore_end=True))) >= 0

    assert growth(cycle) < SLACK


def test_failures(model: _core.Model, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    context = _core.Context(model, n_ctx=32, n_batch=32, n_threads=1)
    too_few = np.zeros((model.routing.n_layer, model.routing.n_expert), np.bool_)

    def cycle() -> None:
        with pytest.raises(_core.MoeshardError):
            _core.Model(str(bad))
        with pytest.raises(_core.MoeshardError):
            context.set_keep(too_few)
        with pytest.raises(ZeroDivisionError):
            context.trace([(0, [1, 2])], lambda *_: 1 // 0)

    assert growth(cycle) < SLACK


def test_gguf_maps(tinymoe: Path) -> None:
    def cycle() -> None:
        gguf = _core.GGUFMap(str(tinymoe))
        gguf.moe_layout()
        views = list(gguf.tensors.values())
        assert views[0].nbytes > 0

    assert growth(cycle) < SLACK
