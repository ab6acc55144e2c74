"""Putting shards together again."""

from __future__ import annotations

import os
from collections.abc import Sequence

import moeshard._core as _core
from moeshard._core import GGUFMap
from moeshard.progress import Progress


def merge(
    shards: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    max_file_size: int | None = None,
    force: bool = False,
    jobs: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Write the whole model from shards that together hold all of its experts.

    Every tensor is, byte for byte, that of the model which the shards were taken from, and so is the metadata.

    Args:
        shards: any part of each; a trunk and files of experts are as good. An expert that several hold is taken from
            the first.
        out: the file to write.
        max_file_size: bytes; a larger model becomes several numbered parts.
        force: replace existing files.
        jobs: threads that copy; 0 for as many as are useful.
        progress: called with the bytes done and those of the whole.

    Returns:
        The paths written.

    Raises:
        MoeshardError: experts are missing (it names them), the shards are of different models, or `out` cannot be
            written.
    """
    # All parts of a shard may be named, as *.gguf does: they are one.
    opened = {file.path: file for file in map(GGUFMap, shards)}
    files = _core.merge_segments(list(opened.values()), max_file_size=max_file_size or 0)
    path = os.fspath(out)
    paths = [path] if len(files) == 1 else [_core.part_path(path, i, len(files)) for i in range(len(files))]
    _core.write_segments(files, paths, force=force, jobs=jobs, progress=progress)
    return paths
