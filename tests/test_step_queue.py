"""Steps of a batcher for a reader in another thread."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

import moeshard._core as _core

PROMPT = [300, 301, 302, 303]


@pytest.fixture(scope="module")
def native(tinymoe: Path) -> _core.Model:
    return _core.Model(str(tinymoe))


@pytest.fixture
def batcher(native: _core.Model) -> _core.Batcher:
    return _core.Batcher(native, n_slots=2, n_ctx=512, n_threads=1)


def submit(batcher: _core.Batcher, n_tokens: int) -> int:
    return batcher.submit(
        PROMPT, max_tokens=n_tokens, ignore_end=True, sampling=_core.SamplingParams(temperature=0)
    )  # fmt: skip


def test_the_steps_are_those_of_the_batcher(native: _core.Model, batcher: _core.Batcher) -> None:
    plain = _core.Batcher(native, n_slots=2, n_ctx=512, n_threads=1)
    submit(plain, 20)
    wanted = []
    while steps := plain.step():
        wanted += [(step.token, step.text, step.n_generated) for step in steps]
    queue = _core.StepQueue()
    number = submit(batcher, 20)
    assert queue.run(batcher, seconds=60) == [number]
    steps = queue.take()
    assert [(step.token, step.text, step.n_generated) for step in steps] == wanted
    assert steps[-1].over and not queue.take()


def test_it_ends_where_one_request_is_over_and_goes_on(batcher: _core.Batcher) -> None:
    queue = _core.StepQueue()
    short, long = submit(batcher, 3), submit(batcher, 9)
    assert queue.run(batcher, seconds=60) == [short]
    assert queue.run(batcher, seconds=60) == [long]
    assert queue.run(batcher, seconds=60) == []
    told = [(step.id, step.over) for step in queue.take()]
    assert len([1 for number, _ in told if number == short]) == 3
    assert told[-1] == (long, True)


def test_so_many_steps_or_seconds(batcher: _core.Batcher) -> None:
    queue = _core.StepQueue()
    submit(batcher, 400)
    assert queue.run(batcher, 5, 60) == [] and len(queue.take()) == 5
    assert queue.run(batcher, seconds=0) == [] and len(queue.take()) == 1


def test_another_thread_interrupts(batcher: _core.Batcher) -> None:
    queue = _core.StepQueue()
    submit(batcher, 500)
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(queue.run(batcher, seconds=600)))
    thread.start()
    while not (steps := queue.take()):
        time.sleep(0.001)
    queue.interrupt()
    thread.join(60)
    assert found == [[]]
    n = len(steps) + len(queue.take())
    assert 1 <= n < 500
    assert queue.run(batcher, 1, 60) == [] and len(queue.take()) == 1  # it was one interruption


def test_a_reader_is_woken_once(batcher: _core.Batcher) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    try:
        queue = _core.StepQueue(write)
        submit(batcher, 100)
        queue.run(batcher, 10, 60)
        assert len(os.read(read, 100)) == 8
        queue.run(batcher, 1, 60)  # nobody took what is there
        with pytest.raises(BlockingIOError):
            os.read(read, 100)
        assert len(queue.take()) == 11
        queue.run(batcher, 1, 60)
        assert len(os.read(read, 100)) == 8
    finally:
        os.close(read)
        os.close(write)
