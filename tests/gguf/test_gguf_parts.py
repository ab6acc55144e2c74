"""Models of several parts."""

from __future__ import annotations

from pathlib import Path

import gguf_bytes as gb
import pytest
from gguf_bytes import Gguf

import moeshard


def parts(count: int = 3, model: str = "a") -> list[Gguf]:
    made = []
    for i in range(count):
        g = Gguf()
        if i == 0:
            g.kv("general.name", gb.STRING, model)
        g.kv("split.no", gb.U16, i).kv("split.count", gb.U16, count).kv("split.tensors.count", gb.I32, 2 * count)
        made.append(g.tensor(f"{i}.first", (4, i + 1)).tensor(f"{i}.second", (32, 2), "q8_0"))
    return made


@pytest.fixture
def write(tmp_path):
    def write(files: list[Gguf], count: int | None = None) -> list[Path]:
        paths = [tmp_path / f"m-{i + 1:05}-of-{count or len(files):05}.gguf" for i in range(len(files))]
        for path, g in zip(paths, files, strict=True):
            path.write_bytes(g.build())
        return paths

    return write


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_finds_all(write, given):
    files = parts()
    paths = write(files)
    m = moeshard.GGUFMap(paths[given])
    assert m.path == str(paths[0])
    assert [part.path for part in m.parts] == [str(p) for p in paths]
    assert m.metadata["general.name"] == "a"
    assert [info.part for info in m.tensor_infos] == [0, 0, 1, 1, 2, 2]
    for g in files:
        for t in g.tensors:
            assert m.tensors[t.name.decode()].tobytes() == t.data


def test_one_part_of_one(write):
    (path,) = write(parts(1))
    assert len(moeshard.GGUFMap(path).parts) == 1
    path = path.rename(path.with_name("anything.gguf"))
    assert len(moeshard.GGUFMap(path).parts) == 1


@pytest.mark.parametrize(("given", "missing"), [(0, 1), (0, 2), (2, 0), (2, 1)])
def test_missing_part(write, given, missing):
    paths = write(parts())
    paths[missing].unlink()
    with pytest.raises(moeshard.MoeshardError, match=f"0000{missing + 1}-of-00003.*part {missing + 1} of 3 is missing"):
        moeshard.GGUFMap(paths[given])


def test_name_that_does_not_lead_to_the_others(write):
    path = write(parts())[1]
    for name in ["renamed.gguf", "m-2-of-3.gguf", "m-00002-of-00004.gguf", "m_00002-of-00003.gguf"]:
        path = path.rename(path.with_name(name))
        with pytest.raises(moeshard.MoeshardError, match="one of 3 parts.*must end in '-00001-of-00003.gguf'"):
            moeshard.GGUFMap(path)


def test_exchanged_parts(write):
    paths = write(parts())
    paths[1].rename(paths[1].with_suffix(".x"))
    paths[2].rename(paths[1])
    paths[1].with_suffix(".x").rename(paths[2])
    with pytest.raises(moeshard.MoeshardError, match="m-00002-of-00003.gguf: does not say that it is part 1"):
        moeshard.GGUFMap(paths[0])


def test_part_without_its_number(write):
    files = parts()
    files[1].entries = files[1].entries[1:]
    with pytest.raises(moeshard.MoeshardError, match="m-00002-of-00003.gguf: does not say that it is part 1"):
        moeshard.GGUFMap(write(files)[0])


def test_part_without_the_count(write):
    files = parts()
    files[2].entries = files[2].entries[:1]
    with pytest.raises(moeshard.MoeshardError, match="m-00003-of-00003.gguf: has no split.count"):
        moeshard.GGUFMap(write(files)[0])


def test_parts_of_different_models(write):
    files = parts()
    files[1].kv("general.name", gb.STRING, "b")
    with pytest.raises(moeshard.MoeshardError, match="'general.name' differs .* not of one model"):
        moeshard.GGUFMap(write(files)[0])


def test_part_of_a_model_with_another_number_of_tensors(write):
    files = parts()
    files[1].tensors.pop()
    with pytest.raises(moeshard.MoeshardError, match=r"has 6 tensors \(split.tensors.count\), but the 3 parts hold 5"):
        moeshard.GGUFMap(write(files)[0])


def test_tensor_in_two_parts(write):
    files = parts()
    files[2].tensors[0].name = b"0.first"
    with pytest.raises(moeshard.MoeshardError, match="'0.first' is both in .*00001-of.* and in .*00003-of"):
        moeshard.GGUFMap(write(files)[0])


def test_damaged_part_is_named(write):
    paths = write(parts())
    paths[1].write_bytes(paths[1].read_bytes()[:-80])
    with pytest.raises(moeshard.MoeshardError, match="m-00002-of-00003.gguf: .*past the end"):
        moeshard.GGUFMap(paths[0])


def test_split_count_of_another_type(write):
    files = parts()
    files[0].entries[2] = Gguf().kv("split.count", gb.STRING, "three").entries[0]
    with pytest.raises(moeshard.MoeshardError, match="'split.count' should be an integer, but is of type string"):
        moeshard.GGUFMap(write(files)[0])
