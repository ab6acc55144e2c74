"""The folder in which a worker keeps tensors that it was sent."""

from __future__ import annotations

from pathlib import Path

from moeshard._core import MoeshardError

_NAME_LENGTH = 16
"""Of a file that the engine wrote: a hash of its content, in hexadecimal."""


def prepare_cache(folder: Path) -> None:
    """Make the folder where it is not there, and remove what a worker that was killed left unfinished.

    Raises:
        MoeshardError: it holds other things than tensors, so that its files must not be removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in folder.iterdir() if not _is_tensor(path) and path.suffix != ".part"]
        if foreign:
            raise MoeshardError(
                f"'{folder}' holds other things than a worker's tensors ('{sorted(foreign)[0]}'); give a folder of its "
                f"own to --cache"
            )
        for path in folder.glob("*.part"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise MoeshardError(f"'{folder}' cannot be used as a cache: {error.strerror or error}") from error


def prune_cache(folder: Path, size: int) -> int:
    """Remove the tensors used longest ago until the rest has at most `size` bytes; return how many bytes that is."""
    files = sorted(
        (
            (stat.st_mtime, stat.st_size, path)
            for path in folder.iterdir()
            if _is_tensor(path)
            for stat in [path.stat()]
        ),
        reverse=True,
    )
    held = 0
    for _, n_bytes, path in files:
        if held + n_bytes > size:
            path.unlink(missing_ok=True)
        else:
            held += n_bytes
    return held


def _is_tensor(path: Path) -> bool:
    return len(path.name) == _NAME_LENGTH and set(path.name) <= set("0123456789abcdef")
