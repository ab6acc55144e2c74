"""Models whose layers lie on workers: they answer as one machine would, and losing one is an error."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli
from worker_process import Start, Worker

import moeshard
from moeshard import Model, MoeshardError
from moeshard.runtime import remote
from moeshard.runtime.workers import ask

TOKENS = np.arange(40, 100)
linux = pytest.mark.skipif(sys.platform != "linux", reason="a worker's own processes are found in /proc")


def endpoints(workers: list[Worker]) -> list[str]:
    return [worker.endpoint for worker in workers]


@pytest.fixture(scope="module")
def local(tinymoe: Path) -> Model:
    return Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def halves(local: Model) -> np.ndarray:
    keep = np.zeros((local.n_layer, local.n_expert), dtype=bool)
    keep[:, ::2] = True
    return keep


@pytest.mark.parametrize("n", [1, 2, 3])
def test_logits_are_those_of_one_machine(n: int, three: list[Worker], local: Model, halves: np.ndarray) -> None:
    with Model(local.path, rpc=endpoints(three)[:n], n_threads=1) as model:
        np.testing.assert_array_equal(model.logits(TOKENS), local.logits(TOKENS))
        np.testing.assert_array_equal(model.logits(TOKENS, halves), local.logits(TOKENS, halves))
        assert model.layout.n_layer == local.layout.n_layer and model.expert_ids.tolist() == local.expert_ids.tolist()


def test_answers_are_those_of_one_machine(three: list[Worker], local: Model, halves: np.ndarray) -> None:
    with Model(local.path, rpc=endpoints(three), layer_split=[1, 1, 3], n_threads=1) as model:
        for keep in (None, halves):
            asked = {"max_tokens": 24, "seed": 3, "keep": keep}
            assert "".join(model.generate("The river", **asked)) == "".join(local.generate("The river", **asked))
        texts = []
        for engine in (model, local):
            batcher = engine.batcher(n_slots=2, n_ctx=128)
            first = batcher.submit(model.tokenize("def f(x):"), max_tokens=12, sampling=greedy())
            second = batcher.submit(model.tokenize("Die Stadt"), max_tokens=12, sampling=greedy(), keep=halves)
            found = {first: b"", second: b""}
            over: set[int] = set()
            while len(over) < 2:
                for progress in batcher.step():
                    found[progress.id] += progress.text
                    over |= {progress.id} if progress.over else set()
            texts.append([found[first], found[second]])
        assert texts[0] == texts[1]


def greedy() -> moeshard._core.SamplingParams:
    return moeshard._core.SamplingParams(temperature=0.0)


def test_some_experts_and_traces(three: list[Worker], local: Model, halves: np.ndarray) -> None:
    with Model(local.path, keep=halves, rpc=endpoints(three)[:2], n_threads=1) as model:
        shard = Model(local.path, keep=halves, n_threads=1)
        np.testing.assert_array_equal(model.logits(TOKENS), shard.logits(TOKENS))
        ours, theirs = model.trace(TOKENS, norms=True), shard.trace(TOKENS, norms=True)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.weights, theirs.weights)
        np.testing.assert_array_equal(ours.norms, theirs.norms)
        with pytest.raises(ZeroDivisionError):
            model.trace_stream(TOKENS, lambda chunk: 1 / 0)
        np.testing.assert_array_equal(model.logits(TOKENS), shard.logits(TOKENS))


def test_errors_of_the_engine_come_through(three: list[Worker], local: Model) -> None:
    with Model(local.path, rpc=endpoints(three)[:2], n_threads=1) as model:
        with pytest.raises(MoeshardError, match="layer 0"):
            model.logits(TOKENS, "0-3")
        with pytest.raises(MoeshardError):
            model.logits([10**6])
        np.testing.assert_array_equal(model.logits(TOKENS), local.logits(TOKENS))


def test_a_busy_worker_says_so(start: Start, tinymoe: Path) -> None:
    worker = start()
    with Model(tinymoe, rpc=[worker.endpoint]) as model:
        model.logits(TOKENS)
        assert ask(worker.endpoint).busy is not None
        began = time.monotonic()
        with pytest.raises(MoeshardError, match=f"worker {worker.endpoint} serves .* one client at a time"):
            Model(tinymoe, rpc=[worker.endpoint])
        assert time.monotonic() - began < 30
        model.logits(TOKENS)
    wait_until(lambda: ask(worker.endpoint).busy is None)
    Model(tinymoe, rpc=[worker.endpoint]).close()
    assert "left after" in worker.end()


def wait_until(true: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listener(answer: bytes) -> socket.socket:
    """Something that listens and answers everybody alike."""
    sock = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            with connection:
                connection.recv(100)
                connection.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return sock


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "is no moeshard worker"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no moeshard worker"),
        (b'{"versions": 3, "memory": 1, "n_threads": 1, "busy": null}\n', "is no moeshard worker"),
        (
            b'{"versions": {"moeshard": "0.0.1"}, "memory": 1, "n_threads": 1, "busy": null}\n',
            "runs moeshard 0.0.1, this is .*; install the same version",
        ),
    ],
)
def test_what_is_no_worker_of_this_version(answer: bytes, message: str, tinymoe: Path) -> None:
    with listener(answer) as sock, pytest.raises(MoeshardError, match=message):
        Model(tinymoe, rpc=[f"127.0.0.1:{sock.getsockname()[1]}"])


def test_workers_that_cannot_be_reached(tinymoe: Path, three: list[Worker]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        nowhere = f"127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(MoeshardError, match=f"worker {nowhere} cannot be reached: .*'moeshard worker --bind {nowhere}"):
        Model(tinymoe, rpc=[nowhere])
    for wrong in ("here", "here:", ":1", "here:70000", "here:x"):
        with pytest.raises(MoeshardError, match="write host:port"):
            Model(tinymoe, rpc=[wrong])
    with pytest.raises(MoeshardError, match="named twice"):
        Model(tinymoe, rpc=[three[0].endpoint] * 2)
    for split in ([5], [5, 0], [2, 2], [1, 1, 3]):
        with pytest.raises(MoeshardError, match="5 together"):
            Model(tinymoe, rpc=endpoints(three)[:2], layer_split=split)


def test_layers_that_do_not_fit(start: Start, tinymoe: Path) -> None:
    worker = start("--memory", "4MiB")
    assert "4.0 MiB for layers" in worker.said
    with pytest.raises(MoeshardError, match=f"the workers have 4.0 MiB \\({worker.endpoint}\\); add a worker"):
        Model(tinymoe, rpc=[worker.endpoint])
    others = [start("--memory", "9MiB") for _ in range(2)]
    with Model(tinymoe, rpc=endpoints(others)) as model:
        assert model.logits(TOKENS).shape[0] == TOKENS.size


@linux
@pytest.mark.parametrize("how", ["worker", "engine of the worker", "own engine"])
def test_losing_a_process(how: str, start: Start, local: Model) -> None:
    workers = [start(), start()]
    model = Model(local.path, rpc=endpoints(workers), n_threads=1)
    answer = model.generate("The river", max_tokens=200, ignore_end=True, seed=1)
    for _ in range(5):
        next(answer)
    lost = workers[1]
    if how == "worker":
        lost.kill()
        message = f"worker {lost.endpoint} cannot be reached"
    elif how == "engine of the worker":
        for pid in children(lost.process.pid):
            os.kill(pid, signal.SIGKILL)
        message = "its process ended with code"
    else:
        engine = model._loaded.engine
        assert isinstance(engine, remote.RemoteEngine)
        engine._process.kill()
        message = "its process ended with code -9"
    with pytest.raises(MoeshardError, match=f"{workers[0].endpoint}, {lost.endpoint} was lost: {message}"):
        list(answer)
    if how == "worker":
        with pytest.raises(MoeshardError, match=f"worker {lost.endpoint} cannot be reached"):
            model.logits(TOKENS)
        start(port=lost.port)
    np.testing.assert_array_equal(model.logits(TOKENS), local.logits(TOKENS))
    model.close()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] or [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@linux
def test_a_worker_that_hangs(start: Start, local: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.5)
    workers = [start(), start()]
    model = Model(local.path, rpc=endpoints(workers), n_threads=1)
    model.logits(TOKENS)
    for pid in children(workers[1].process.pid):
        os.kill(pid, signal.SIGSTOP)
    workers[1].stop()
    with pytest.raises(MoeshardError, match=f"worker {workers[1].endpoint} says nothing within"):
        model.logits(TOKENS)
    workers[1].kill()
    start(port=workers[1].port)
    np.testing.assert_array_equal(model.logits(TOKENS), local.logits(TOKENS))
    model.close()


def test_a_cache_holds_what_was_sent_and_is_not_believed(
    cache: Path, start: Start, tmp_path: Path, large_tensors: Path
) -> None:
    wanted = Model(large_tensors, n_threads=1).logits(TOKENS)
    worker = start("--cache", cache)
    for damage in (None, None, "cut", "changed"):
        files = sorted(cache.iterdir()) if cache.exists() else []
        if damage == "cut":
            os.truncate(files[0], 1000)
        elif damage == "changed":
            with open(files[0], "r+b") as file:
                file.write(b"something else")
        before = {path.name: path.stat().st_size for path in files}
        with Model(large_tensors, rpc=[worker.endpoint], n_threads=1) as model:
            np.testing.assert_array_equal(model.logits(TOKENS), wanted)
        wait_until(lambda: ask(worker.endpoint).busy is None)
        after = {path.name: path.stat().st_size for path in cache.iterdir()}
        assert after and (damage is not None or not before or after == before)
    worker.end()
    total = sum(path.stat().st_size for path in cache.iterdir())
    (cache / "0123456789abcdef.7.part").write_bytes(b"left")
    start("--cache", cache, "--cache-size", str(total - 1))
    kept = [path.stat().st_size for path in cache.iterdir()]
    assert 0 < sum(kept) < total

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(AssertionError, match=r"holds other things .*thesis\.tex"):
        start("--cache", tmp_path / "mine")


def test_commands(three: list[Worker], cli: Cli, tmp_path: Path) -> None:
    where = ("--rpc", ",".join(endpoints(three)[:2]), "--split", "2,3", "--threads", "1")
    asked = ("generate", "tinymoe", "-p", "The river", "-n", "12", "--seed", "4", "--json")
    ours, theirs = (json.loads(cli(*asked, *more).out) for more in (where, ("--threads", "1")))
    assert ours["text"] == theirs["text"]
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the town. " * 60)
    found = cli("analyze", "tinymoe", "--text", text, "-o", tmp_path / "p.npz", *where)
    assert found.code == 0, found.err
    assert cli("analyze", "tinymoe", "--text", text, "-o", tmp_path / "q.npz", "--threads", "1").code == 0
    a, b = (moeshard.read_profile(tmp_path / name) for name in ("p.npz", "q.npz"))
    np.testing.assert_array_equal(a.count, b.count)
    np.testing.assert_array_equal(a.saliency, b.saliency)
    wrong = cli("generate", "tinymoe", "-p", "x", "--split", "2,3")
    assert wrong.code == 2 and "--split goes with --rpc" in wrong.err
    wrong = cli("generate", "tinymoe", "-p", "x", "--rpc", three[0].endpoint, "--split", "all")
    assert wrong.code == 2 and "is no split" in wrong.err
