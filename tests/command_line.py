"""The command line, called in the process of the tests."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Result:
    code: int
    out: str
    err: str


class Cli:
    """Runs the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> Result:
        from moeshard.cli import main

        self._monkeypatch.setattr(sys, "argv", ["moeshard", *map(str, arguments)])
        code: object = None
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        assert code is None or isinstance(code, int)
        return Result(code or 0, *self._capsys.readouterr())
