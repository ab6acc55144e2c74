"""Files that commands read and write: looked at before the work, and nothing that was found is lost after it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

STDOUT = Path("-")
"""As an output: stdout."""


def no_stdout(path: Path, what: str) -> None:
    """Refuse to write to stdout what is no stream."""
    if path == STDOUT:
        raise typer.BadParameter(f"--out -: {what} cannot go to stdout; name a file")


def check_files(
    *outputs: Path | None,
    inputs: Iterable[str | os.PathLike[str]],
    force: bool,
    as_json: bool = False,
    binary: Path | None = None,
) -> None:
    """Raise an error where something that a command will have found could not be written.

    Args:
        outputs: to be written, `STDOUT` among them.
        inputs: see `moeshard.files.atomic.check_outputs`.
        force: whether existing files are replaced.
        as_json: whether stdout is taken by --json.
        binary: one more output, which no terminal can show.
    """
    from moeshard.files.atomic import check_outputs

    given = [path for path in (*outputs, binary) if path is not None]
    if given.count(STDOUT) + as_json > 1:
        raise typer.BadParameter("only one result can go to stdout: leave out --json, or name files instead of '-'")
    if binary == STDOUT and sys.stdout.isatty():
        raise typer.BadParameter("a picture cannot be shown in a terminal; name a file, or send stdout to one")
    check_outputs([path for path in given if path != STDOUT], inputs, force=force)


def files_read(
    model: str | None = None, *files: Path | str | None, texts: Iterable[str] | None = None, folder: Path | None = None
) -> list[str]:
    """Return the files that a command reads.

    Args:
        model: the MODEL argument.
        files: others.
        texts: ``FILE`` or ``NAME=FILE``.
        folder: all that lies in it.
    """
    from moeshard.gguf.inspection import files_of
    from moeshard.traffic.domains import name_and_path
    from moeshard.traffic.embedded import resolve_model

    found = [] if model is None else files_of(resolve_model(model))
    found += [str(path) for path in files if path is not None]
    found += [name_and_path(spec)[1] for spec in texts or ()]
    if folder is not None and folder.is_dir():
        found += [entry.path for entry in os.scandir(folder)]
    return found


class Results:
    """Writes what a command found.

    Where a file cannot be written after all, what it should hold is written elsewhere, the command goes on, and
    `finish` raises.
    """

    def __init__(self, *, force: bool):
        self._force = force
        self._failed: list[str] = []

    def write(self, path: Path | None, data: str | bytes) -> None:
        """Write one file, or to stdout; None: nowhere."""
        if path == STDOUT:
            from moeshard.cli.terminal import pour, pour_bytes

            if isinstance(data, bytes):
                pour_bytes(data)
            else:
                pour(data)
        elif path is not None:
            self._write(path, data)

    def _write(self, path: Path, data: str | bytes) -> None:
        from moeshard import MoeshardError
        from moeshard.files.atomic import write_atomically

        try:
            write_atomically(path, data, force=self._force)
            return
        except MoeshardError as error:
            failed = str(error)
        for other in _elsewhere(path):
            try:
                write_atomically(other, data)
            except MoeshardError:
                continue
            failed += f"; what it should hold is in '{other}'"
            break
        self._failed.append(failed)

    def finish(self) -> None:
        """Raise a `MoeshardError` where something could not be written as it should."""
        from moeshard import MoeshardError

        if self._failed:
            raise MoeshardError("; ".join(self._failed))


def _elsewhere(path: Path) -> Iterator[Path]:
    now = time.strftime("%Y%m%d-%H%M%S")
    yield path.with_name(f"{path.stem}-{now}{path.suffix}")
    yield Path(tempfile.gettempdir()) / f"moeshard-{now}-{os.getpid()}{path.suffix}"
