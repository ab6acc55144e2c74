"""A context belongs to one session at a time: not to one that is closed, and to one thread of those that share one."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import moeshard


@pytest.fixture(scope="module")
def whole(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


def test_a_closed_session_computes_nothing(whole: moeshard.Model) -> None:
    text = whole.tokenize("The expert mask is a boolean array of layers and experts.")
    with whole.session() as session:
        session.decode({0: text[:-1]}, "none")
        wanted = session.decode({0: text[-1:]})[0]
    old = whole.session()
    old.decode({0: text[:4]})
    old.close()
    with whole.session() as new:
        new.decode({0: text[:-1]}, "none")
        for use in (
            lambda: old.decode({0: text[:4]}),
            lambda: old.trace({0: text[:4]}, lambda chunk: None),
            lambda: old.measure({0: text[:4]}, whole.moe_layers),
            lambda: old.set_keep("0-63"),
            lambda: old.reset(),
            lambda: old.n_past(),
            lambda: old.abort(),
            lambda: old.n_ctx,
        ):
            with pytest.raises(moeshard.MoeshardError, match="session is closed"):
                use()
        assert new.n_past() == len(text) - 1
        np.testing.assert_array_equal(new.decode({0: text[-1:]})[0], wanted)


def test_two_threads_in_one_session(whole: moeshard.Model) -> None:
    """One computes, the other is told; what the first computes is not harmed, and closing waits for it."""
    text = np.tile(whole.tokenize("Threads share a session only by mistake. "), 40)[:400]
    wanted = whole.logits(text)
    session = whole.session()
    begun, go_on = threading.Event(), threading.Event()
    errors: list[Exception] = []

    def wait(chunk: moeshard.TraceChunk) -> None:
        begun.set()
        assert go_on.wait(60)

    worker = threading.Thread(target=lambda: session.trace({0: text}, wait))
    worker.start()
    try:
        assert begun.wait(60)
        for use in (lambda: session.decode({0: text[:1]}), lambda: session.reset()):
            with pytest.raises(moeshard.MoeshardError, match="another thread computes"):
                use()
        session.close()
        with whole.session() as other:  # not the context in which that thread still computes
            result = other.decode({0: text}, "all")[0]
    finally:
        go_on.set()
        worker.join(60)
    assert not errors and not worker.is_alive()
    np.testing.assert_array_equal(result, wanted)
    with pytest.raises(moeshard.MoeshardError, match="session is closed"):
        session.decode({0: text[:1]})


def test_the_collector_ends_a_session_inside_the_pool(whole: moeshard.Model) -> None:
    """The garbage collector may run anywhere, also where a thread looks for a context."""

    class Cycle:
        session: moeshard.Session
        itself: Cycle

    cycle = Cycle()
    cycle.session, cycle.itself = whole.session(), cycle
    pool = whole._loaded.contexts
    ended = threading.Event()

    def collect_within() -> None:
        nonlocal cycle
        with pool._lock:
            del cycle
            gc.collect()
        ended.set()

    threading.Thread(target=collect_within, daemon=True).start()
    assert ended.wait(60), "a session that was collected waits for the pool's lock"


def keeps_of(n: int) -> npt.NDArray[np.bool_]:
    keep = np.zeros((5, 128), dtype=bool)
    keep[:, :n] = True
    return keep


def test_a_context_that_was_given_back_has_no_keep(whole: moeshard.Model) -> None:
    text = whole.tokenize("Nothing of one session is left in the next.")
    wanted = whole.logits(text)
    with whole.session() as session:
        session.set_keep(keeps_of(16))
        session.decode({0: text})
    with whole.session() as session:
        np.testing.assert_array_equal(session.decode({0: text}, "all")[0], wanted)
