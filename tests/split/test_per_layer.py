"""Shards whose layers hold different numbers of experts: as files, from the command line, and damaged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli
from shard_files import Keep, typical_difference

import moeshard
from moeshard import GGUFMap, MoeshardError, Plan, PlanNode, _core
from moeshard.gguf.identity import identify

COUNTS = "moeshard.expert_counts"
SIZES = (16, 24, 8, 64, 40)  # of the five layers of tinymoe


def unequal(seed: int = 1) -> Keep:
    rng = np.random.default_rng(seed)
    keep = np.zeros((len(SIZES), 128), dtype=bool)
    for row, size in zip(keep, SIZES, strict=True):
        row[rng.choice(128, size, replace=False)] = True
    return keep


@pytest.fixture
def keep_file(tmp_path: Path) -> Path:
    path = tmp_path / "keep.txt"
    path.write_text(moeshard.format_keep(unequal()), encoding="utf-8")
    return path


def two_nodes(tinymoe: Path, parameters: dict[str, object]) -> Plan:
    keep = unequal()
    nodes = [PlanNode("a", keep), PlanNode("b", ~keep)]
    return Plan(nodes, "by hand", parameters, identify(GGUFMap(tinymoe)))


def test_a_shard_from_the_command_line(cli: Cli, tinymoe: Path, keep_file: Path, tmp_path: Path) -> None:
    shard, options = tmp_path / "x.gguf", ("--keep", keep_file)
    refused = cli("split", "tinymoe", "-o", shard, *options)
    assert refused.code != 0 and "--per-layer" in refused.err and "--balance" in refused.err
    for wrong in (("--groups", 2), (*options, "--balance")):
        assert "--per-layer goes with" in " ".join(
            cli("split", "tinymoe", "-o", shard, *wrong, "--per-layer").err.split()
        )
    dry = cli("split", "tinymoe", "-o", shard, *options, "--per-layer", "--dry-run", "--json")
    (said,) = json.loads(dry.out)["shards"]
    assert not shard.exists()
    done = cli("split", "tinymoe", "-o", shard, *options, "--per-layer")
    assert done.code == 0 and "8-64 of 128" in done.out
    assert shard.stat().st_size == said["bytes"]
    assert (said["n_expert_fewest"], said["n_expert"]) == (8, 64)
    assert GGUFMap(shard).metadata[COUNTS].tolist() == list(SIZES)

    done = cli("verify", shard, "--source", "tinymoe", "--logits", "--threads", 1)
    assert done.code == 0 and "8-64 of 128 experts per layer" in done.out
    assert "8-64 per layer, 8 per token" in cli("inspect", shard).out
    assert json.loads(cli("inspect", shard, "--json").out)["expert_counts"] == list(SIZES)
    done = cli("generate", shard, "-p", "The", "-n", 4, "--threads", 1, "--temperature", 0, "--keep", "0-30,32-63")
    assert done.code == 0 and "8-63 of 64 experts per layer" in done.err


def test_only_unequal_shards_say_so(tinymoe: Path, tmp_path: Path) -> None:
    moeshard.split(tinymoe, "0-63", tmp_path / "a.gguf", per_layer=True)
    moeshard.split(tinymoe, "0-63", tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_plan_there_and_back(cli: Cli, tinymoe: Path, tmp_path: Path) -> None:
    two_nodes(tinymoe, {}).write(tmp_path / "unmarked.json")
    two_nodes(tinymoe, {"per_layer": True}).write(tmp_path / "plan.json")
    unmarked = ("split", "tinymoe", "-o", tmp_path / "u", "--plan", tmp_path / "unmarked.json")
    assert "--per-layer" in cli(*unmarked).err
    assert cli(*unmarked, "--per-layer", "--dry-run").code == 0

    plan = ("--plan", tmp_path / "plan.json")
    assert cli("split", "tinymoe", "-o", tmp_path / "s", *plan).code == 0
    shards = sorted((tmp_path / "s").glob("*.gguf"))
    assert cli("merge", *shards, "-o", tmp_path / "whole.gguf").code == 0
    assert (tmp_path / "whole.gguf").read_bytes() == tinymoe.read_bytes()

    assert cli("split", "tinymoe", "-o", tmp_path / "t", *plan, "--trunk-once").code == 0
    parts = [tmp_path / "t" / name for name in ("trunk.gguf", "tinymoe.a.gguf", "tinymoe.b.gguf")]
    for part in parts:
        assert cli("verify", part, "--source", "tinymoe").code == 0
    assert cli("merge", *parts, "-o", tmp_path / "again.gguf").code == 0
    assert (tmp_path / "again.gguf").read_bytes() == tinymoe.read_bytes()
    tokens = np.arange(40)
    joined = moeshard.Model(trunk=parts[0], experts=parts[1], n_threads=1)
    streamed = moeshard.Model(tinymoe, keep=unequal(), n_threads=1)
    shard = moeshard.Model(shards[0], n_threads=1)
    np.testing.assert_array_equal(joined.logits(tokens), shard.logits(tokens))
    np.testing.assert_array_equal(streamed.logits(tokens), shard.logits(tokens))
    for model in (joined, streamed, shard):
        assert model.routing.expert_counts == list(SIZES)
        for layer, size in enumerate(SIZES):
            assert model.expert_ids[layer, :size].tolist() == np.flatnonzero(unequal()[layer]).tolist()
            assert (model.expert_ids[layer, size:] == -1).all()


@pytest.mark.parametrize("more", [(), ("--trunk-once",)])
def test_nodes_are_evaluated_by_their_shards(cli: Cli, tinymoe: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    two_nodes(tinymoe, {"per_layer": True}).write(tmp_path / "plan.json")
    plan = ("--plan", tmp_path / "plan.json")
    assert cli("split", "tinymoe", "-o", tmp_path / "s", *plan, *more).code == 0
    (tmp_path / "text.txt").write_text("The package manager installs what it is told to. " * 40, encoding="utf-8")
    quick = ("--text", tmp_path / "text.txt", "--windows", 4, "--window", 64, "--prompt", 16, "--threads", 1)
    found = [
        json.loads(cli("evaluate", "tinymoe", *plan, *quick, "--generate", 0, "--json", *shards).out)
        for shards in ((), ("--shards", tmp_path / "s"))
    ]
    for masked, shard in zip(found[0]["groups"], found[1]["groups"], strict=True):
        assert shard["nll"] == pytest.approx(masked["nll"], rel=0.01)


def test_fewer_experts_per_token(tinymoe: Path, tmp_path: Path) -> None:
    """One number for all layers: what the layer with fewest experts can do."""
    keep = unequal()
    keep[2] = False
    keep[2, [3, 5, 90]] = True
    with pytest.raises(MoeshardError, match="holds 3 experts of layer 2, but a token uses 8"):
        moeshard.split(tinymoe, keep, tmp_path / "x.gguf", per_layer=True)
    moeshard.split(tinymoe, keep, tmp_path / "x.gguf", per_layer=True, clamp=True)
    shard = moeshard.Model(tmp_path / "x.gguf", n_threads=1)
    assert shard.routing.n_expert_used == [3] * 5
    whole = moeshard.Model(tinymoe, n_threads=1, n_expert_used=3)
    tokens = np.arange(60)
    ours, theirs = shard.logits(tokens), whole.logits(tokens, keep)
    assert typical_difference(ours, theirs) < 0.05
    assert moeshard.verify(tmp_path / "x.gguf", tinymoe).n_expert_fewest == 3
    keep[2] = False
    with pytest.raises(MoeshardError, match="the keep holds no experts in layer 2"):
        moeshard.split(tinymoe, keep, tmp_path / "y.gguf", per_layer=True, clamp=True)
    with pytest.raises(MoeshardError, match="only 3 experts in some layer"):
        moeshard.Model(tmp_path / "x.gguf", n_expert_used=4)


SCRIPT = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_gpu_layers = 0
try:
    xllamacpp.Server(params)
except Exception as error:
    sys.exit(f"refused: {error}")
"""


def test_another_llama_cpp_refuses_it(tinymoe: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed: pip install '.[test]'")
    moeshard.split(tinymoe, unequal(), tmp_path / "x.gguf", per_layer=True)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "refused" in done.stderr and "wrong shape" in done.stderr


def values(path: Path, key: str) -> tuple[int, int]:
    """Return where the values of an array of uint32 lie in a file, and how many there are."""
    at, size = GGUFMap(path).parts[0].entry_ranges[key]
    head = 8 + len(key) + 4 + 4 + 8
    return at + head, (size - head) // 4


def put(key: str, index: int, value: int) -> Callable[[bytearray, Path], None]:
    def damage(data: bytearray, path: Path) -> None:
        at, count = values(path, key)
        assert index < count
        data[at + 4 * index : at + 4 * index + 4] = value.to_bytes(4, "little")

    return damage


def rename(data: bytearray, path: Path) -> None:
    at, _ = GGUFMap(path).parts[0].entry_ranges[COUNTS]
    data[at + 8 + 9 : at + 8 + 10] = b"x"


def shorten(data: bytearray, path: Path) -> None:
    """Four values instead of five; the fifth becomes the length of a key that is behind the end of the file."""
    at, _ = values(path, "moeshard.layers")
    rest = at + 4 * 4
    data[at - 8 : at] = (4).to_bytes(8, "little")
    data[rest : len(data) - 4] = data[rest + 4 :]
    # As many bytes of header as before: a text gets them.
    name = b"moeshard.version"
    begin = data.index(name) + len(name) + 4
    length = int.from_bytes(data[begin : begin + 8], "little")
    data[begin : begin + 8] = (length + 4).to_bytes(8, "little")
    data[begin + 8 + length : begin + 8 + length] = b"...."
    del data[-4:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put(COUNTS, 0, 0), "expert_counts is 0 in layer 0, it must be from 1 to the expert_count, 64"),
        (put(COUNTS, 1, 65), "expert_counts is 65 in layer 1"),
        (put(COUNTS, 1, 0xFFFFFFFF), "expert_counts is 4294967295 in layer 1"),
        (put(COUNTS, 2, 7), "expert_used_count is 8 in layer 2, more than the 7 experts of the layer"),
        (put(COUNTS, 1, 25), "should have 25 experts in its dimension"),
        (put("moeshard.layers", 1, 0), "moeshard.layers does not hold ascending numbers"),
        (put("moeshard.layers", 4, 9), "moeshard.layers does not hold ascending numbers"),
        (shorten, "expert_counts has 5 values for the 4 layers of moeshard.layers"),
        (rename, "should have 64 experts in its dimension"),
    ],
)
def test_damaged_counts(damage: Callable[[bytearray, Path], None], message: str, tinymoe: Path, tmp_path: Path) -> None:
    """An error that says what is wrong, also where llama.cpp's loader is asked first."""
    path = tmp_path / "x.gguf"
    moeshard.split(tinymoe, unequal(), path, per_layer=True)
    data = bytearray(path.read_bytes())
    damage(data, path)
    path.write_bytes(data)
    for use in (moeshard.Model, lambda file: moeshard.verify(file, tinymoe), lambda file: GGUFMap(file).moe_layout()):
        with pytest.raises(MoeshardError, match=message):
            use(path)
    if damage is not rename:
        with pytest.raises(MoeshardError, match=message):
            _core.Model(str(path))
