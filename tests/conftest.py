"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
from command_line import Cli

# A shell that starts the tests in the background has Ctrl-C ignored in them, and in all processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def use_core(path: str) -> None:
    """Let ``moeshard._core`` be another build of it, e.g. the one with sanitizers."""
    spec = importlib.util.spec_from_file_location("moeshard._core", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


if other := os.environ.get("MOESHARD_TEST_CORE"):
    use_core(other)


@pytest.fixture(scope="session")
def tinymoe() -> Path:
    """Return the path of the embedded model."""
    import moeshard

    return moeshard.embedded_model()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.setenv("COLUMNS", "80")
    return Cli(monkeypatch, capsys)
