"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from moeshard import MoeshardError
from moeshard.files.atomic import atomic_file, check_outputs, write_atomically, write_together


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()
    mode = os.umask(0)
    os.umask(mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mode
    with pytest.raises(MoeshardError, match="file: exists already.*--force"):
        write_atomically(path, b"other")
    with pytest.raises(MoeshardError, match="cannot write: .*surrogates"):
        write_atomically(path, "\ud800", force=True)
    assert path.read_bytes() == "é".encode()
    write_atomically(path, b"other", force=True)
    assert path.read_bytes() == b"other"
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("file")
    for force in (False, True):  # cp refuses as well: nobody knows whether that is where it shall be
        with pytest.raises(MoeshardError, match="link: is a link to 'file', which does not exist"):
            write_atomically(link, b"through", force=force)
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(MoeshardError, match="link: exists already"):
        write_atomically(link, b"through")
    write_atomically(link, b"again", force=True)
    assert link.is_symlink()
    assert (tmp_path / "file").read_bytes() == b"again"


def make_thing(kind: str, path: Path) -> None:
    """Something that is no file. The device is a new node of what nothing is lost in."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except OSError:
            pytest.skip("may not make devices here")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "directory"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_left_alone(kind: str, linked: bool, tmp_path: Path) -> None:
    thing = tmp_path / "thing"
    make_thing(kind, thing)
    before = thing.lstat()
    path = thing
    if linked:
        path = tmp_path / "link"
        path.symlink_to(thing)
    said = f"{path.name}: is a {kind}, not a file"
    for force in (False, True):
        with pytest.raises(MoeshardError, match=said):
            write_atomically(path, b"", force=force)
        with pytest.raises(MoeshardError, match=said):
            check_outputs([path], force=force)
        with pytest.raises(MoeshardError, match=said), atomic_file(path, force=force):
            raise AssertionError
    assert os.path.samestat(thing.lstat(), before) and thing.lstat().st_mode == before.st_mode


def test_what_takes_the_name_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def replace_by_a_pipe() -> None:
        path.unlink()
        os.mkfifo(path)

    with pytest.raises(MoeshardError, match="file: is a pipe"), atomic_file(path, force=True):
        replace_by_a_pipe()
    assert stat.S_ISFIFO(path.lstat().st_mode)
    path.unlink()
    with pytest.raises(MoeshardError, match="file: appeared while it was being written"), atomic_file(path):
        path.write_bytes(b"mine")
    assert path.read_bytes() == b"mine"


def test_inputs_are_known_by_what_they_are(tmp_path: Path) -> None:
    read = tmp_path / "read"
    read.write_bytes(b"mine")
    (tmp_path / "hard").hardlink_to(read)
    (tmp_path / "soft").symlink_to("read")
    (tmp_path / "here").symlink_to(".")
    for name in ("read", "hard", "soft", "here/read", "here/../" + tmp_path.name + "/read"):
        for force in (False, True):
            with pytest.raises(MoeshardError, match="is the file that is read"):
                check_outputs([tmp_path / "new", f"{tmp_path}/{name}"], [tmp_path / "missing", read], force=force)
            with pytest.raises(MoeshardError, match="is the file that is read"):
                write_together({f"{tmp_path}/{name}": b""}, inputs=[read], force=force)
    check_outputs([tmp_path / "new"], [read])
    assert read.read_bytes() == b"mine"


def test_a_folder_that_takes_no_file_is_noticed_before(tmp_path: Path) -> None:
    with pytest.raises(MoeshardError, match="the folder '.*missing' does not exist; make it"):
        check_outputs([tmp_path / "missing" / "file"])
    with pytest.raises(MoeshardError, match="would be written twice"):
        check_outputs([tmp_path / "file", f"{tmp_path}/./file"])
    with pytest.raises(MoeshardError, match="names a folder"):
        check_outputs([f"{tmp_path}/folder/"])
    check_outputs([tmp_path / "file"])
    assert list(tmp_path.iterdir()) == []


def test_together_means_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "2").write_bytes(b"mine")
    with pytest.raises(MoeshardError, match="2: exists already"):
        write_together({tmp_path / "1": b"one", tmp_path / "2": "two"})
    assert {path.name for path in tmp_path.iterdir()} == {"2"}
    write_together({tmp_path / "1": b"one", tmp_path / "2": "two"}, force=True)
    assert ((tmp_path / "1").read_bytes(), (tmp_path / "2").read_text()) == (b"one", "two")


def test_names_as_long_as_they_may_be_and_not_of_utf_8(tmp_path: Path) -> None:
    for name in (b"n" * 255, b"caf\xe9", "é".encode() * 127):
        path = os.fsencode(tmp_path) + b"/" + name
        write_atomically(os.fsdecode(path), b"data")
        with pytest.raises(MoeshardError, match="exists already"):
            write_atomically(os.fsdecode(path), b"data")
        with open(path, "rb") as file:
            assert file.read() == b"data"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(MoeshardError, match=f"{name}: is a .*, not a file"):
            write_atomically(tmp_path / name, b"", force=True)
    for name, said in (("no/folder", "No such file"), ("folder/" + "x" * 300, "too long"), ("a\0b", "null")):
        with pytest.raises(MoeshardError, match=f": cannot write: .*{said}"):
            write_atomically(f"{tmp_path}/{name}", b"")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "pipe"]


def test_failure_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MoeshardError, match="file: cannot write .*: File too large"):
            write_atomically(path, bytes(100_000), force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
