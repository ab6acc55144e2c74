"""Models in parts, and models that were: any part stands for all, and what a file says of its parts is given back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli
from shard_files import refused

import moeshard
from moeshard import GGUFMap, Model, _core
from moeshard.gguf.identity import fingerprint

sys.path.insert(0, str(Path(__file__).parents[1] / "gguf"))

import gguf_bytes as gb
from other_metadata import entry, with_entries

# Any part of several


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the embedded model as several files."""
    folder = tmp_path_factory.mktemp("parts")
    whole = moeshard.embedded_model()
    moeshard.split(whole, ["0-63", "64-127"], folder)
    halves = [folder / f"tinymoe.group-{i}.gguf" for i in range(2)]
    made = moeshard.merge(halves, folder / "model.gguf", max_file_size=5 << 20)
    assert len(made) >= 3
    return [Path(path) for path in made]


def run_commands(cli: Cli, part: Path, folder: Path) -> list[str]:
    """Call what takes a model, write into the folder, and return what was printed."""
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("One expert knows about text, another one about numbers. " * 20)

    def run(*command: str | Path) -> str:
        done = cli(*command)
        assert done.code == 0, (command, done.err)
        return done.out

    few = ("--threads", "1")
    profile = folder / "profile.npz"
    printed = [run("inspect", part), run("generate", part, "-p", "The", "-n", "4", "--temperature", "0", *few)]
    run("analyze", part, "--text", text, "-n", "128", "--window", "64", "-o", profile, *few)
    run("split", part, "-o", folder, "--groups", "2", "--max-file-size", "2MiB")
    last = [max(folder.glob(f"model.group-{index}-*.gguf")) for index in range(2)]
    assert all("-00001-of-" not in path.name for path in last)
    for shard in last:
        run("verify", shard, "--source", part)
    run("merge", *last, "-o", folder / "again.gguf")
    windows = ("--windows", "4", "--window", "24", "--prompt", "8")
    shown = run("evaluate", part, "--plan", folder / "plan.json", "--text", text, *windows, *few)
    run("plan", part, "--profile", profile, "--groups", "2", "--keep", "64", "-o", folder / "new.json")
    return [*printed, shown]


def test_every_command_takes_any_part(parts: list[Path], cli: Cli, tmp_path: Path) -> None:
    """What is printed and written does not depend on which part was named."""
    first = run_commands(cli, parts[0], tmp_path / "first")
    assert run_commands(cli, parts[1], tmp_path / "second") == first
    names = {path.name for path in (tmp_path / "first").glob("*.gguf")}
    assert names == {path.name for path in (tmp_path / "second").glob("*.gguf")} and "again.gguf" in names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_all_parts_of_shards_may_be_named(parts: list[Path], tmp_path: Path) -> None:
    moeshard.split(parts[-1], ["0-63", "64-127"], tmp_path, max_file_size=2 << 20)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 4
    moeshard.merge(files, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").stat().st_size == moeshard.embedded_model().stat().st_size


def test_any_part_is_loaded(parts: list[Path], tinymoe: Path) -> None:
    tokens = np.arange(10)
    want = Model(tinymoe, n_ctx=64, n_threads=1).logits(tokens)
    for mmap in (True, False):
        model = Model(parts[1], n_ctx=64, n_threads=1, mmap=mmap)
        assert model.path == str(parts[0])
        np.testing.assert_array_equal(model.logits(tokens), want)
    half = Model(parts[2], keep="0-63", n_ctx=64, n_threads=1)
    np.testing.assert_array_equal(
        half.logits(tokens), Model(tinymoe, keep="0-63", n_ctx=64, n_threads=1).logits(tokens)
    )


# What was in parts


# What llama-gguf-split --merge leaves in a file, and where another program may have moved it.
MERGED = [
    entry("split.no", gb.U16, 0),
    entry("split.tensors.count", gb.I32, 27),
    entry("split.count", gb.U16, 0),
]


@pytest.fixture(params=["at the end", "in the middle", "apart"])
def merged(request: pytest.FixtureRequest, tinymoe: Path, tmp_path: Path) -> Path:
    path = tmp_path / "merged.gguf"
    if request.param == "at the end":
        return with_entries(tinymoe, path, MERGED)
    if request.param == "in the middle":
        return with_entries(tinymoe, path, MERGED, at=3)
    other = with_entries(tinymoe, tmp_path / "other.gguf", MERGED[:1], at=0)
    return with_entries(other, path, MERGED[1:], at=9)


def test_what_was_merged_is_given_back(merged: Path, tmp_path: Path) -> None:
    moeshard.split(merged, ["0-63", "64-127"], tmp_path)
    shards = [tmp_path / f"merged.group-{i}.gguf" for i in range(2)]
    for shard in shards:
        moeshard.verify(shard, merged)
        assert not any(key.startswith("split.") for key in GGUFMap(shard).metadata)
    moeshard.merge(shards, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == merged.read_bytes()


def test_what_was_merged_is_given_back_by_a_trunk(merged: Path, tmp_path: Path) -> None:
    moeshard.split(merged, ["0-63", "64-127"], tmp_path, trunk_once=True)
    files = [tmp_path / name for name in ("trunk.gguf", "merged.group-0.gguf", "merged.group-1.gguf")]
    for file in files:
        moeshard.verify(file, merged)
    moeshard.merge(files, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == merged.read_bytes()


def test_divided_anew_it_says_so_itself(merged: Path, tmp_path: Path) -> None:
    moeshard.split(merged, ["0-63", "64-127"], tmp_path, max_file_size=2 << 20)
    for first in tmp_path.glob("merged.group-*-00001-of-*.gguf"):
        moeshard.verify(first, merged)
    shards = sorted(tmp_path.glob("merged.group-*-00001-of-*.gguf"))
    made = moeshard.merge(shards, tmp_path / "again.gguf", max_file_size=5 << 20)
    assert len(made) > 2
    assert GGUFMap(made[1]).metadata["split.count"] == len(made)
    moeshard.merge(shards, tmp_path / "again.gguf", max_file_size=1 << 30)
    assert (tmp_path / "again.gguf").read_bytes() == merged.read_bytes()


def test_shards_of_earlier_versions_have_no_such_note(merged: Path, tmp_path: Path) -> None:
    """They are verified as they are, and merged without what they do not know."""
    file = GGUFMap(merged)
    shards = []
    for index, keep in enumerate(("0-63", "64-127")):
        notes = [("version", "0.1.0"), ("fingerprint", fingerprint(file))]
        rows = moeshard.parse_keep(keep, file.moe_layout().n_layer, 128)
        shards.append(tmp_path / f"old.{index}.gguf")
        _core.write_segments(_core.shard_segments(file, rows, notes=notes), [shards[-1]])
        moeshard.verify(shards[-1], merged)
    moeshard.merge(shards, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == moeshard.embedded_model().read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "3",
        "3:",
        "3:0",
        "-1:00",
        "3:zz",
        "99999999:" + MERGED[0].hex(),
        "3:" + MERGED[0].hex() + "00",
        "3:" + MERGED[0][:-1].hex(),
        "3:" + entry("other.no", gb.U16, 0).hex(),
        "18446744073709551616:" + MERGED[0].hex(),
    ],
)
def test_damaged_note(text: str, tinymoe: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    moeshard.split(tinymoe, "all", whole / "all.gguf")
    odd = with_entries(whole / "all.gguf", whole / "odd.gguf", [entry("moeshard.split_entries", gb.STRING, text)])
    with refused(whole, "odd.gguf: moeshard.split_entries .*damaged"):
        moeshard.merge([odd], whole / "again.gguf")
