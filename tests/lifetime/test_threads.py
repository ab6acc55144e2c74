"""Computing releases the GIL, and models do not share state."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeshard import _core


def test_gil_is_released_while_computing(context: _core.Context, tokens: npt.NDArray[np.int32]) -> None:
    ticks = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        start = time.monotonic()
        ticks = 0
        context.decode([(0, tokens)])
        seen, seconds = ticks, time.monotonic() - start
    finally:
        stop.set()
        thread.join()
    # Held for all of the call, the GIL would let at most the tick through that began before it.
    assert seen >= 3, f"{seen} ticks in {seconds:.3f} s"


def test_two_models_in_two_threads(tinymoe: Path, tokens: npt.NDArray[np.int32]) -> None:
    def work(first: int, out: list[npt.NDArray[np.float32]], barrier: threading.Barrier) -> None:
        model = _core.Model(str(tinymoe))
        context = _core.Context(model, n_ctx=512, n_threads=1)
        keep = np.ones((model.routing.n_layer, model.routing.n_expert), np.bool_)
        keep[:, first::2] = False
        context.set_keep(keep)
        barrier.wait()
        for _ in range(5):
            context.reset()
            out.append(context.decode([(0, tokens)])[0])

    expected = []
    for first in (0, 1):
        alone: list[npt.NDArray[np.float32]] = []
        work(first, alone, threading.Barrier(1))
        expected.append(alone[0])
    assert not np.array_equal(expected[0], expected[1])

    together: list[list[npt.NDArray[np.float32]]] = [[], []]
    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(first, together[first], barrier)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first in (0, 1):
        assert len(together[first]) == 5
        for logits in together[first]:
            np.testing.assert_array_equal(logits, expected[first])


def test_one_model_in_two_contexts_at_once(model: _core.Model, tokens: npt.NDArray[np.int32]) -> None:
    results: dict[int, npt.NDArray[np.float32]] = {}

    def work(index: int) -> None:
        context = _core.Context(model, n_ctx=512, n_threads=1)
        results[index] = context.decode([(0, tokens)])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(results[0], results[1])
