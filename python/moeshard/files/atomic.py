"""Files that are there whole or not at all. The core writes them, models and small files alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

import moeshard._core as _core
from moeshard._core import MoeshardError

StrPath = str | os.PathLike[str]


def check_outputs(paths: Iterable[StrPath], inputs: Iterable[StrPath] = (), *, force: bool = False) -> None:
    """Raise a `MoeshardError` where files could not be written: said before the work that they shall hold.

    Args:
        paths: of the files. A symbolic link is followed.
        inputs: files that are read, of which none is replaced, under whichever of its names. What does not exist, or is
            no file, is passed over.
        force: whether existing files are replaced.
    """
    _core.check_outputs(list(map(_name, paths)), list(inputs), force=force)


def write_atomically(path: StrPath, data: bytes | str, *, force: bool = False) -> None:
    """Write a small file as `write_together` does."""
    write_together({path: data}, force=force)


def write_together(
    files: Mapping[StrPath, bytes | str], *, inputs: Iterable[StrPath] = (), force: bool = False
) -> None:
    """Write small files: all of them, or none. Each is flushed to the disk before one gets its name.

    Args:
        files: by path, what each shall hold; text is written as UTF-8. Folders must exist, symbolic links are followed.
        inputs: see `check_outputs`.
        force: whether existing files are replaced.

    Raises:
        MoeshardError: a file exists and `force` is False, something other than a file has its name, or it cannot be
            written. Existing files are then as they were, and nothing else is left behind.
    """
    contents = {_name(path): _bytes(path, data) for path, data in files.items()}
    _core.write_segments(list(contents.values()), list(contents), force=force, inputs=list(inputs))


@contextlib.contextmanager
def atomic_file(path: StrPath, *, force: bool = False) -> Iterator[IO[bytes]]:
    """Open a file to be written, which gets its name when the block ends; see `write_together` for the rest."""
    new = _core.PendingFile(_name(path), force=force)
    try:
        with open(new.fileno(), "w+b", closefd=False) as file:
            yield file
        new.publish()
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        new.discard()


@contextlib.contextmanager
def made_folder(path: StrPath) -> Iterator[None]:
    """Make a folder, where there is none, to write into; where the block fails, leave none that was made."""
    made = not os.path.isdir(path)
    try:
        os.makedirs(path, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MoeshardError(f"cannot make the folder '{os.fspath(path)}': {reason}") from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # somebody else has put something into it
                os.rmdir(path)
        raise


def _name(path: StrPath) -> bytes:
    """Return the bytes of a path: it need not be UTF-8."""
    try:
        name = os.fsencode(path)
        if b"\0" in name:
            raise ValueError("embedded null byte")
    except ValueError as error:  # no system call takes it
        raise _failed(path, error) from error
    return name


def _bytes(path: StrPath, data: bytes | str) -> bytes:
    try:
        return data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError as error:
        raise _failed(path, error) from error


def _failed(path: StrPath, error: OSError | ValueError) -> MoeshardError:
    return MoeshardError(f"{os.fspath(path)}: cannot write: {getattr(error, 'strerror', None) or error}")
