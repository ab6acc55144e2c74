"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest

from moeshard import MoeshardError
from moeshard.files.atomic import write_atomically


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()
    mode = os.umask(0)
    os.umask(mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mode
    with pytest.raises(MoeshardError, match="'.*file' exists.*--force"):
        write_atomically(path, b"other")
    with pytest.raises(MoeshardError, match="cannot write .*surrogates"):
        write_atomically(path, "\ud800", force=True)
    assert path.read_bytes() == "é".encode()
    write_atomically(path, b"other", force=True)
    assert path.read_bytes() == b"other"
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("file")
    write_atomically(link, b"through")
    write_atomically(link, b"again", force=True)
    assert link.is_symlink()
    assert (tmp_path / "file").read_bytes() == b"again"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(MoeshardError, match="not a file"):
            write_atomically(tmp_path / name, b"", force=True)
    for name, said in (("no/folder", "No such file"), ("folder/" + "x" * 300, "too long"), ("a\0b", "null")):
        with pytest.raises(MoeshardError, match=f"cannot write .*{said}"):
            write_atomically(f"{tmp_path}/{name}", b"")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "pipe"]


def test_failure_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MoeshardError, match="cannot write '.*file': File too large"):
            write_atomically(path, bytes(100_000), force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
