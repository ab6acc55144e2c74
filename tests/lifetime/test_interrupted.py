"""A computation that is broken off raises what broke it off, and leaves the context as it was."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moeshard import _core

Tokens = npt.NDArray[np.int32]


class Unwanted(Exception):
    pass


def assert_usable(context: _core.Context, model: _core.Model, tokens: Tokens) -> None:
    """The context computes what a fresh one does."""
    fresh = _core.Context(model, n_ctx=context.n_ctx, n_ubatch=32, n_threads=1)
    context.reset()
    np.testing.assert_array_equal(context.decode([(0, tokens)])[0], fresh.decode([(0, tokens)])[0])


@pytest.mark.parametrize("good_ubatches", [0, 1, 3])
def test_sink_raises(context: _core.Context, model: _core.Model, tokens: Tokens, good_ubatches: int) -> None:
    calls = 0

    def sink(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > good_ubatches:
            raise Unwanted("no more")

    with pytest.raises(Unwanted, match="no more"):
        context.trace([(0, tokens)], sink, norms=True)
    assert calls == good_ubatches + 1
    assert context.n_past() == 0
    assert_usable(context, model, tokens)


def test_failed_trace_keeps_what_was_there(context: _core.Context, tokens: Tokens) -> None:
    context.decode([(0, tokens[:10])])
    expected = context.decode([(0, tokens[10:20])])[0]
    context.reset()
    context.decode([(0, tokens[:10])])
    with pytest.raises(ZeroDivisionError):
        context.trace([(0, tokens[10:])], lambda *_: 1 // 0)
    assert context.n_past() == 10
    np.testing.assert_array_equal(context.decode([(0, tokens[10:20])])[0], expected)


def test_sink_is_released(context: _core.Context, tokens: Tokens) -> None:
    class Sink:
        def __call__(self, *_: object) -> None:
            pass

    sink = Sink()
    before = sys.getrefcount(sink)
    context.trace([(0, tokens[:8])], sink)
    assert sys.getrefcount(sink) == before


def run_until_it_raises(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException], threading.Event]:
    raised: list[BaseException] = []
    started = threading.Event()

    def target() -> None:
        started.set()
        try:
            while True:
                work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, raised, started


def test_abort_from_another_thread(context: _core.Context, model: _core.Model, tokens: Tokens) -> None:
    def work() -> None:
        context.reset()
        context.decode([(0, tokens)])

    thread, raised, started = run_until_it_raises(work)
    started.wait()
    # A decode clears the flag when it begins, so one abort may come between two of them.
    deadline = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < deadline:
        context.abort()
        thread.join(0.005)
    assert not thread.is_alive()
    assert isinstance(raised[0], _core.MoeshardError)
    assert "abort" in str(raised[0])
    assert_usable(context, model, tokens)


def test_abort_while_nothing_runs(context: _core.Context, model: _core.Model, tokens: Tokens) -> None:
    context.abort()
    assert_usable(context, model, tokens)


def test_keyboard_interrupt(context: _core.Context, model: _core.Model, tokens: Tokens) -> None:
    def compute() -> None:
        while True:
            context.reset()
            context.decode([(0, tokens)])

    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        compute()
    timer.join()
    assert_usable(context, model, tokens)


def test_interrupted_program_ends(tinymoe: Path) -> None:
    """Ctrl-C in the middle of one long call ends a program the way it ends any Python program."""
    program = textwrap.dedent("""
        import sys
        import numpy as np
        from moeshard import _core

        model = _core.Model(sys.argv[1])
        context = _core.Context(model, n_ctx=1 << 16, n_ubatch=32, n_threads=1)
        print("computing", flush=True)
        context.decode([(0, np.ones((1 << 16) - 8, np.int32))])
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tinymoe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "computing\n"
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.strip().endswith("KeyboardInterrupt")


def test_error_in_progress_callback(tinymoe: Path) -> None:
    def progress(fraction: float) -> bool:
        raise Unwanted(f"at {fraction}")

    with pytest.raises(Unwanted):
        _core.Model(str(tinymoe), progress=progress)
    with pytest.raises(_core.MoeshardError):
        _core.Model(str(tinymoe), progress=lambda fraction: False)
