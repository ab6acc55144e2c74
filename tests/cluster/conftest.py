"""Real workers, each a process of its own on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from worker_process import Start, Worker


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers with options; those left are ended after the test."""
    with _workers() as begin:
        yield begin


@pytest.fixture(scope="module")
def three() -> Iterator[list[Worker]]:
    """Three workers for all tests of a module, one after the other."""
    with _workers() as begin:
        yield [begin() for _ in range(3)]


@contextmanager
def _workers() -> Iterator[Start]:
    running: list[Worker] = []

    def begin(*options: str | os.PathLike[str], port: int = 0) -> Worker:
        running.append(Worker(*map(os.fspath, options), port=port))
        return running[-1]

    try:
        yield begin
    finally:
        for worker in running:
            if worker.process.poll() is None:
                worker.kill()


@pytest.fixture(scope="session")
def large_tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tensors of more than 10 MiB: only those go to a worker's cache."""
    path = tmp_path_factory.mktemp("synthetic") / "large.gguf"
    script = Path(__file__).parents[2] / "benchmarks" / "synthetic.py"
    subprocess.run([sys.executable, script, path, "--layers", "1", "--narrow", "4"], check=True)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
