"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import IO

from moeshard._core import MoeshardError


def write_atomically(path: str | os.PathLike[str], data: bytes | str, *, force: bool = False) -> None:
    """Write a small file as `atomic_file` does; text is written as UTF-8."""
    with atomic_file(path, force=force) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[IO[bytes]]:
    """Open a file to be written under a name beside it, which at the end is flushed to the disk and renamed.

    Args:
        path: of the file; its folder must exist. A symbolic link is followed.
        force: whether an existing file is replaced.

    Raises:
        MoeshardError: the file exists and `force` is False, something other than a file has its name, or it cannot be
            written. An existing file is then as it was, and nothing else is left behind.
    """
    name = os.fspath(path)
    try:
        # Where the path is a link, the rename below would replace the link and not what it points to.
        target = os.path.realpath(name)
        if os.path.lexists(target):
            if not os.path.isfile(target):
                raise MoeshardError(f"cannot write '{name}': it exists and is not a file; choose another name")
            if not force:
                raise MoeshardError(f"'{name}' exists; choose another name, or replace it with --force (force=True)")
        with _replacing(target) as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a path that no system call takes, a text that has no UTF-8
        raise MoeshardError(f"cannot write '{name}': {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def _replacing(target: str) -> Iterator[IO[bytes]]:
    # Not made from the target's name, to which nothing could be added where it is as long as names may be.
    temporary = os.path.join(os.path.dirname(target), f".moeshard-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
