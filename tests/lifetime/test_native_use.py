"""What a context owes to threads, to processes that were forked off, and to the memory that others need."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard import MoeshardError, _core


def test_a_second_thread_is_refused(context: _core.Context, tokens: np.ndarray) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        begun.set()
        assert go_on.wait(60)

    worker = threading.Thread(target=lambda: context.trace([(0, tokens)], wait))
    worker.start()
    try:
        assert begun.wait(60)
        for use in (
            lambda: context.decode([(0, tokens[:1])]),
            lambda: context.reset(),
            lambda: context.set_keep(None),
            lambda: context.limit(5),
        ):
            with pytest.raises(MoeshardError, match="in use already"):
                use()
    finally:
        go_on.set()
        worker.join(60)
    assert not worker.is_alive() and context.n_past() == len(tokens)
    context.decode([(0, tokens[:1])])


def test_limits_are_exact(model: _core.Model) -> None:
    context = _core.Context(model, n_ctx=10, n_threads=1)
    assert context.n_ctx == 10 and context.capacity >= 10
    context.decode([(0, np.arange(10, dtype=np.int32))])
    with pytest.raises(MoeshardError, match="holds 10 of 10 tokens; 1 more do not fit"):
        context.decode([(0, np.array([1], dtype=np.int32))])
    context.limit(12)
    context.decode([(0, np.array([1, 2], dtype=np.int32))])
    with pytest.raises(MoeshardError, match="has room for"):
        context.limit(context.capacity + 1)


@pytest.mark.parametrize(("n_ctx", "n_seq"), [(2**31 - 1, 2), (2**24, 256), (2**31 - 1, 1)])
def test_lengths_that_do_not_fit_32_bits(model: _core.Model, n_ctx: int, n_seq: int) -> None:
    with pytest.raises(MoeshardError, match="more than a context can count"):
        _core.Context(model, n_ctx=n_ctx, n_seq_max=n_seq)


def test_what_ran_before_changes_no_limit(tinymoe: Path) -> None:
    """A context that a longer text left behind is not one that may be filled."""
    model = moeshard.Model(tinymoe, n_ctx=64, n_threads=1)
    prompt = model.tokenize("Once upon a time")

    def length() -> tuple[int, str]:
        answer = model.generate(prompt, max_tokens=-1, ignore_end=True, seed=1)
        list(answer)
        return len(answer.tokens), answer.stop_reason

    first = length()
    assert first == (64 - len(prompt) + 1, "context")
    model.logits(np.resize(prompt, 700))
    assert length() == first
    with model.session(n_ctx=33) as session:
        assert session.n_ctx == 33


sanitized = pytest.mark.skipif("MOESHARD_TEST_CORE" in os.environ, reason="a sanitizer has its own idea of memory")


def child(code: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_process_is_told(tinymoe: Path) -> None:
    done = child(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import moeshard
        model = moeshard.Model(sys.argv[1], n_threads=2)
        session = model.session()
        session.decode({0: [1, 2, 3]})
        child = os.fork()
        if child == 0:
            code = 0
            for use in (lambda: model.logits([1, 2]), lambda: session.decode({0: [1]}), lambda: model.session()):
                try:
                    use()
                    code = 1
                except moeshard.MoeshardError as error:
                    if "forked" not in str(error):
                        print(error, flush=True)
                        code = 2
            own = moeshard.Model(sys.argv[1], n_threads=2)
            if own.logits([1, 2]).shape[0] != 2:
                code = 3
            del session, model, own
            sys.exit(code)
        _, status = os.waitpid(child, 0)
        session.decode({0: [4]})
        sys.exit(os.waitstatus_to_exitcode(status))
        """,
        str(tinymoe),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_closed_model(tinymoe: Path) -> None:
    with moeshard.Model(tinymoe, n_threads=1) as model:
        session = model.session()
        answer = model.generate("Once upon", max_tokens=5, ignore_end=True, seed=1)
    # What was begun goes on; nothing new begins.
    assert session.decode({0: [1]})[0].shape == (1, 4096) and len(list(answer)) >= 1
    session.close()
    for use in (
        lambda: model.logits([1]),
        lambda: model.tokenize("a"),
        lambda: model.session(),
        lambda: model.generate("a"),
        lambda: model.n_expert,
        lambda: model.batcher(),
    ):
        with pytest.raises(MoeshardError, match="model is closed"):
            use()
    model.close()
    assert model.path == str(tinymoe)


@sanitized
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_closing_gives_the_memory_back(tinymoe: Path) -> None:
    done = child(
        """
        import os, sys
        import moeshard
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        def once():
            with moeshard.Model(sys.argv[1], n_threads=1, n_ctx=32768, mmap=False) as model:
                model.logits([1, 2, 3])
                return resident()
        once()
        before = resident()
        during = once()
        assert during - before > 50 << 20, (before, during)
        assert resident() - before < 20 << 20, (before, during, resident())
        """,
        str(tinymoe),
    )
    assert done.returncode == 0, done.stderr


@sanitized
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_idle_contexts_make_room(tinymoe: Path) -> None:
    """Where a context cannot be made beside those that are idle, these are given up."""
    done = child(
        """
        import resource, sys
        import moeshard
        model = moeshard.Model(sys.argv[1], n_threads=1, n_ctx=60000)
        sessions = [model.session(n_seq=n) for n in (1, 2)]
        for session in sessions:
            session.close()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), -1))
        with model.session(n_seq=3) as session:
            print(session.n_ctx, session.decode({2: [1]})[2].shape)
        """,
        str(tinymoe),
    )
    assert done.returncode == 0 and done.stdout.startswith("60000"), done.stdout + done.stderr


def test_a_sibling_of_a_part_is_that_part(tinymoe: Path) -> None:
    half = moeshard.Model(tinymoe, keep="0-63", n_threads=1)
    fewer = half.sibling(n_expert_used=4)
    assert fewer.n_expert == 64 and not fewer.is_whole and fewer.n_expert_used == 4
    assert half.sibling(tinymoe).n_expert == 128


def test_placing_looks_at_the_whole_model(tinymoe: Path) -> None:
    model = moeshard.Model(tinymoe, n_threads=1)
    placement = moeshard.Placement(moeshard.plan_groups(tinymoe, 2), model)
    prompt = "The package manager of Debian installs what a system needs, and all that this needs in turn."
    free = placement.place(prompt)
    with model.masked("0-15"):
        assert placement.place(prompt) == free
