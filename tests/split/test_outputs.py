"""Where shards are written: names that must not be, files in the way, and what the files are like."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fault_scripts import sizeable_model
from shard_files import refused, small_source

import moeshard
from moeshard import GGUFMap, MoeshardError, _core


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_source().write(tmp_path / "model.gguf")


def test_missing_folders_and_things_in_the_way(model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "file").write_bytes(b"text")
    for force in (False, True):
        for out, message in [
            (tmp_path / "missing" / "out.gguf", "missing/out.gguf: cannot write: No such file"),
            (tmp_path / "file" / "out.gguf", "file/out.gguf: cannot write: Not a directory"),
            (tmp_path / "folder.gguf", "folder.gguf: is a directory"),
        ]:
            with refused(tmp_path, message):
                moeshard.split(model, "0-3", out, force=force)
        with refused(tmp_path, "cannot make the folder '.*file'"):
            moeshard.split(model, ["0-3", "4-7"], tmp_path / "file", force=force)
    moeshard.split(model, "0-3", tmp_path / "out.gguf")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["model.gguf", "sub/../model.gguf", "symbolic.gguf", "hard.gguf", "in/model.gguf"])
def test_output_onto_its_source(name: str, force: bool, model: Path, tmp_path: Path) -> None:
    (tmp_path / "symbolic.gguf").symlink_to(model)
    (tmp_path / "hard.gguf").hardlink_to(model)
    (tmp_path / "in").symlink_to(tmp_path)
    (tmp_path / "sub").mkdir()
    data = model.read_bytes()
    with refused(tmp_path, "is the file that is read"):
        moeshard.split(model, "0-3", tmp_path / name, force=force)
    if name == "symbolic.gguf":
        with refused(tmp_path, "is the file that is read"):
            moeshard.split(tmp_path / name, "0-3", model, force=force)
    assert model.read_bytes() == data


def test_output_onto_a_part_of_its_source(tmp_path: Path) -> None:
    """Also onto one that nothing is taken from."""
    path = small_source().write_parts(tmp_path, 7)
    keep = moeshard.parse_keep("0-3", 2, 8)
    for i in range(7):
        part = Path(_core.part_path(str(tmp_path / "model"), i, 7))
        assert part.exists()
        for kind in ("shard", "experts", "trunk"):
            (segments,) = _core.shard_segments(GGUFMap(path), keep, kind=kind)
            with refused(tmp_path, f"{part.name}: is the file that is read"):
                _core.write_segments([segments], [part], force=True)


def test_output_onto_a_shard_that_is_merged(model: Path, tmp_path: Path) -> None:
    """Also onto one that others make superfluous."""
    written = moeshard.split(model, ["0-3", "4-7", "2-5"], tmp_path)
    paths = [shard.paths[0] for shard in written]
    for out in paths:
        with refused(tmp_path, "is the file that is read"):
            moeshard.merge(paths, out, force=True)
    moeshard.merge(paths, tmp_path / "out.gguf")


def test_two_outputs_of_one_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (segments,) = _core.shard_segments(GGUFMap(model), moeshard.parse_keep("0-3", 2, 8))
    for other in ("out.gguf", "./out.gguf", "link/out.gguf", "link/../" + tmp_path.name + "/out.gguf"):
        for force in (False, True):
            with refused(tmp_path, "would be written twice"):
                _core.write_segments([segments] * 2, [tmp_path / "out.gguf", f"{tmp_path}/{other}"], force=force)
    _core.write_segments([segments] * 2, [tmp_path / "out.gguf", tmp_path / "Out2.gguf"])


def test_existing_files(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    moeshard.split(model, "0-3", out)
    old, data = GGUFMap(out), out.read_bytes()
    with refused(tmp_path, "out.gguf: exists already; choose another name, or replace it with --force"):
        moeshard.split(model, "4-7", out)
    moeshard.split(model, "4-7", out, force=True)
    assert out.read_bytes() != data
    assert old.metadata["moeshard.kept"].tolist() == [0, 1, 2, 3] * 2  # readers of the old file keep it

    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "nowhere.gguf")
    for force in (False, True):
        with refused(tmp_path, "link.gguf: is a link to '.*nowhere.gguf', which does not exist"):
            moeshard.split(model, "0-3", link, force=force)
    assert link.is_symlink() and not link.exists()
    link.unlink()
    link.symlink_to(out)
    moeshard.split(model, "0-3", link, force=True)
    assert link.is_symlink() and out.read_bytes() == data


def test_what_is_no_file(model: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    (tmp_path / "model.group-1.gguf").symlink_to(pipe)
    for force in (False, True):
        with refused(tmp_path, "pipe.gguf: is a pipe, not a file"):
            moeshard.split(model, "0-3", pipe, force=force)
        with refused(tmp_path, "model.group-1.gguf: is a pipe, not a file"):
            moeshard.split(model, ["0-3", "4-7"], tmp_path, force=force)


def test_names_as_long_as_they_may_be_and_not_of_utf_8(model: Path, tmp_path: Path) -> None:
    for name in ("n" * 250 + ".gguf", os.fsdecode(b"mod\xe9le.gguf")):
        out = tmp_path / name
        (shard,) = moeshard.split(model, "0-3", out)
        assert shard.paths == (str(out),)
        moeshard.split(model, "0-3", out, force=True)
        moeshard.verify(out, model)
        with pytest.raises(MoeshardError) as caught:
            moeshard.split(model, "0-3", out)
        assert str(caught.value).startswith(f"{out}: exists already")
    with refused(tmp_path, "cannot write: File name too long; choose a shorter one"):
        moeshard.split(model, "0-3", tmp_path / ("n" * 300 + ".gguf"))


def test_a_file_that_appears_meanwhile(model: Path, tmp_path: Path) -> None:
    """Nothing else is left either: there are all files or none."""
    halves = [tmp_path / "0.gguf", tmp_path / "1.gguf"]
    files = [_core.shard_segments(GGUFMap(model), moeshard.parse_keep(ids, 2, 8))[0] for ids in ("0-3", "4-7")]
    with pytest.raises(MoeshardError, match="1.gguf: appeared while it was being written"):
        _core.write_segments(files, halves, progress=lambda done, total: halves[1].write_bytes(b"mine"))
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "1.gguf"}
    assert halves[1].read_bytes() == b"mine"


def test_progress_counts_bytes_up_to_all(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    files = [_core.shard_segments(GGUFMap(model), moeshard.parse_keep(ids, 2, 8))[0] for ids in ("0-3", "4-7")]
    _core.write_segments(files, [tmp_path / "0", tmp_path / "1"], progress=lambda *step: seen.append(step))
    assert seen == sorted(seen)
    zeros = sum(size for file in files for kind, _, size, _, _ in file.segments if kind == "zeros")
    assert {total for _, total in seen} == {sum(file.size for file in files) - zeros}
    assert all(0 <= done <= total for done, total in seen)
    assert [_core.first_difference(file, tmp_path / str(i)) for i, file in enumerate(files)] == [None, None]


@pytest.mark.parametrize("jobs", [1, 3, 16])
def test_any_number_of_threads_writes_the_same(jobs: int, tinymoe: Path, tmp_path: Path) -> None:
    keeps = [",".join(map(str, range(start, 128, 4))) for start in range(4)]
    written = moeshard.split(tinymoe, keeps, tmp_path, jobs=jobs)
    for shard in written:
        moeshard.verify(shard.paths[0], tinymoe)


def test_files_are_as_the_umask_says(model: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        moeshard.split(model, "0-3", tmp_path / "out.gguf")
    finally:
        os.umask(before)
    assert (tmp_path / "out.gguf").stat().st_mode & 0o777 == 0o640


def test_holes_stay_holes(tmp_path: Path) -> None:
    path = sizeable_model(tmp_path / "model.gguf", 256 << 20, hole=True)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system makes no holes")
    (shard,) = moeshard.split(path, "0-15,32-47", tmp_path / "out.gguf")
    assert shard.bytes > 128 << 20
    assert (tmp_path / "out.gguf").stat().st_blocks * 512 < 1 << 20
    moeshard.verify(tmp_path / "out.gguf", path)
