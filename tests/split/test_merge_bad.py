"""Files that are not shards, or not of one model, or damaged: a named error, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from shard_files import Gguf, add_table, gb, keep_of, new_source, refused, small_source

import moeshard
from moeshard import GGUFMap, MoeshardError, _core

HALVES = ("0,3,4,6", "1-2,5,7")


@dataclass
class Shards:
    """A model of 8 experts, divided in every way."""

    folder: Path
    model: Path
    shards: list[Path]
    trunk: Path
    experts: list[Path]

    def merge(self, *paths: Path) -> list[str]:
        return moeshard.merge(paths, self.folder / "merged.gguf")


def divide(folder: Path, seed: int = 0, kind: str = "f32") -> Shards:
    folder.mkdir()
    model = small_source(seed=seed, kind=kind).write(folder / "model.gguf")
    whole = moeshard.split(model, HALVES, folder)
    parts = moeshard.split(model, HALVES, folder / "parts", trunk_once=True)
    paths = [Path(shard.paths[0]) for shard in [*whole, *parts]]
    return Shards(folder, model, paths[:2], paths[2], paths[3:])


@pytest.fixture
def good(tmp_path: Path) -> Shards:
    return divide(tmp_path / "good")


def rewrite(path: Path, out: Path, changes: dict[str, Gguf | None]) -> Path:
    """Write the file with other entries: each as the only one of a Gguf, or left out."""
    file = GGUFMap(path)
    data = path.read_bytes()
    g = Gguf()
    for key, (at, size) in file.parts[0].entry_ranges.items():
        if key not in changes:
            g.entries.append(data[at : at + size])
    g.entries += [change.entries[0] for change in changes.values() if change is not None]
    for tensor in gguf.GGUFReader(path).tensors:
        ne = tuple(int(n) for n in tensor.shape)
        g.tensors.append(gb.Tensor(tensor.name.encode(), ne, int(tensor.tensor_type), tensor.data.tobytes()))
    out.write_bytes(g.build())
    return out


def test_the_good_twins(good: Shards, tmp_path: Path) -> None:
    rewritten = rewrite(good.shards[0], tmp_path / "rewritten.gguf", {})
    assert rewritten.read_bytes() == good.shards[0].read_bytes()
    sets = (
        good.shards,
        [good.trunk, *good.experts],
        [good.shards[0], good.experts[1]],
        [good.experts[0], good.shards[1], good.shards[1], good.trunk],  # the same one twice is no harm
    )
    for paths in sets:
        moeshard.merge(paths, tmp_path / "merged.gguf", force=True)
        assert (tmp_path / "merged.gguf").read_bytes() == good.model.read_bytes()
    moeshard.verify(good.shards[0], good.model)


def test_experts_that_nobody_holds(good: Shards) -> None:
    message = "in layer 0 none of them holds experts 1, 2, 5, 7"
    for paths in ([good.shards[0]], [good.shards[0]] * 2, [good.trunk, good.experts[0]]):
        with refused(good.folder, message):
            good.merge(*paths)
    with refused(good.folder, "in layer 0 none of them holds experts 0, 1, 2, 3, 4, 5, 6, 7$"):
        good.merge(good.trunk)
    keep = keep_of(small_source(), 1, 2, 5, 7)
    keep[1, [0, 1]] = [True, False]
    moeshard.split(good.model, keep, good.folder / "other.gguf")
    with refused(good.folder, "in layer 1 none of them holds experts 1"):
        good.merge(good.shards[0], good.folder / "other.gguf")


def test_many_missing_experts_are_not_all_listed(tmp_path: Path) -> None:
    path = small_source(n_expert=24).write(tmp_path / "model.gguf")
    moeshard.split(path, "0-3", tmp_path / "shard.gguf")
    with refused(tmp_path, "holds experts 4, 5, 6, 7, 8, 9, 10, 11 and 12 more$"):
        moeshard.merge([tmp_path / "shard.gguf"], tmp_path / "merged.gguf")


def test_no_trunk_and_no_shards(good: Shards) -> None:
    with refused(good.folder, "group-0.gguf: holds experts only; the file of the trunk is missing"):
        good.merge(*good.experts)
    with refused(good.folder, "no shards"):
        good.merge()
    with refused(good.folder, "model.gguf: is not a shard"):
        good.merge(good.shards[0], good.model)
    with refused(good.folder, "missing.gguf: cannot open"):
        good.merge(good.shards[0], good.folder / "missing.gguf")


def test_shards_of_different_models(good: Shards, tmp_path: Path) -> None:
    other = divide(tmp_path / "other", seed=1)
    message = "other.*was taken from another model than .*good"
    with refused(tmp_path, message):
        good.merge(good.shards[0], other.shards[1])
    with refused(tmp_path, message):
        good.merge(good.trunk, good.experts[0], other.experts[1])
    with refused(tmp_path, message):
        moeshard.Model(trunk=good.trunk, experts=other.experts[0])
    with refused(tmp_path, "was not taken from .*fingerprints differ"):
        moeshard.verify(good.shards[0], other.model)


def test_shards_that_say_the_same_and_are_not(good: Shards, tmp_path: Path) -> None:
    """Without the fingerprint, or with a forged one, shapes and types have to tell."""
    other = divide(tmp_path / "other", kind="f16")
    forged = rewrite(other.shards[1], tmp_path / "forged.gguf", {"moeshard.fingerprint": None})
    with refused(tmp_path, "'blk.0.ffn_up_exps.weight' .*f16.* is not that of .*different models"):
        good.merge(good.shards[0], forged)
    (tmp_path / "wide").mkdir()
    wide = small_source(n_expert=12).write(tmp_path / "wide" / "model.gguf")
    moeshard.split(wide, "1-2,5,7", tmp_path / "wide" / "shard.gguf")
    forged = rewrite(tmp_path / "wide" / "shard.gguf", tmp_path / "forged.gguf", {"moeshard.fingerprint": None})
    with refused(tmp_path, "forged.gguf: was taken from another model"):
        good.merge(good.shards[0], forged)


def test_what_cannot_be_joined(good: Shards) -> None:
    shard, trunk, experts = good.shards[0], good.trunk, good.experts[0]
    for pair, message in [
        ((shard, experts), "group-0.gguf: is not a trunk"),
        ((experts, experts), "group-0.gguf: is not a trunk"),
        ((trunk, trunk), "trunk.gguf: is not a file of experts"),
        ((trunk, shard), "group-0.gguf: is not a file of experts"),
        ((good.model, experts), "model.gguf: is not a shard"),
        ((trunk, good.model), "model.gguf: is not a shard"),
    ]:
        with refused(good.folder, message):
            _core.join_segments(GGUFMap(pair[0]), GGUFMap(pair[1]))
    _core.join_segments(GGUFMap(trunk), GGUFMap(experts))


def kv(key: str, kind: int, value: object) -> dict[str, Gguf | None]:
    return {key: Gguf().kv(key, kind, value)}


def ids(key: str, values: list[Any], kind: int = gb.U32) -> dict[str, Gguf | None]:
    return {key: Gguf().array(key, kind, values)}


KIND, COUNT, LAYERS, KEPT = "moeshard.kind", "moeshard.experts", "moeshard.layers", "moeshard.kept"
FIRST = [0, 3, 4, 6]
DAMAGED: dict[str, tuple[dict[str, Gguf | None], str]] = {
    "kind of another type": (kv(KIND, gb.U32, 1), f"'{KIND}' should be of type string"),
    "unknown kind": (kv(KIND, gb.STRING, "slice"), f"{KIND} is 'slice'"),
    "no count": ({COUNT: None}, f"{COUNT} is missing"),
    "count 0": (kv(COUNT, gb.U32, 0), f"{COUNT} is out of range"),
    "absurd count": (kv(COUNT, gb.U64, 2**63), f"{COUNT} is out of range"),
    "count below the ids": (kv(COUNT, gb.U32, 6), f"{KEPT} does not hold ascending numbers in range"),
    "count of another type": (kv(COUNT, gb.STRING, "8"), f"'{COUNT}' should be an integer"),
    "negative count": (kv(COUNT, gb.I32, -8), f"'{COUNT}' is negative"),
    "no layers": ({LAYERS: None}, f"{LAYERS} is missing"),
    "layer out of range": (ids(LAYERS, [0, 2]), f"{LAYERS} does not hold ascending numbers in range"),
    "layers not ascending": (ids(LAYERS, [1, 0]), f"{LAYERS} does not hold ascending numbers in range"),
    "a layer twice": (ids(LAYERS, [0, 0]), f"{LAYERS} does not hold ascending numbers in range"),
    "a layer too few": (ids(LAYERS, [0]), f"{LAYERS} does not name|{KEPT} does not hold"),
    "layers of another type": (ids(LAYERS, ["0", "1"], gb.STRING), f"'{LAYERS}' should be"),
    "no ids": ({KEPT: None}, f"{KEPT} is missing"),
    "empty ids": (ids(KEPT, []), f"{KEPT} does not hold as many ids"),
    "an id too few": (ids(KEPT, (FIRST * 2)[:-1]), f"{KEPT} does not hold as many ids"),
    "ids of one layer": (ids(KEPT, FIRST), f"{KEPT} does not hold as many ids"),
    "id out of range": (ids(KEPT, [*FIRST, 0, 3, 4, 8]), f"{KEPT} does not hold ascending numbers in range"),
    "ids not ascending": (ids(KEPT, [*FIRST, 0, 4, 3, 6]), f"{KEPT} does not hold ascending numbers in range"),
    "an id twice": (ids(KEPT, [*FIRST, 0, 3, 3, 6]), f"{KEPT} does not hold ascending numbers in range"),
    "negative id": (ids(KEPT, [-1, *FIRST[1:], *FIRST], gb.I32), f"'{KEPT}'.*negative"),
    "ids of another type": (ids(KEPT, [float(i) for i in FIRST * 2], gb.F32), f"'{KEPT}' should be"),
    "a note of another type": (kv("moeshard.plan", gb.U32, 1), "'moeshard.plan' should be of type string"),
    "original count of another type": (
        kv("moeshard.source.qwen3moe.expert_count", gb.STRING, "8"),
        "moeshard.source.qwen3moe.expert_count is no earlier value",
    ),
    "original count is another": (
        kv("moeshard.source.qwen3moe.expert_count", gb.U32, 9),
        "moeshard.source.qwen3moe.expert_count is no earlier value",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_keys(case: str, good: Shards) -> None:
    changes, message = DAMAGED[case]
    damaged = rewrite(good.shards[0], good.folder / "damaged.gguf", changes)
    with refused(good.folder, f"damaged.gguf: .*({message})"):
        good.merge(damaged, good.shards[1])
    with pytest.raises(MoeshardError):
        moeshard.verify(damaged, good.model)


@pytest.mark.parametrize("key", [LAYERS, KEPT, COUNT])
def test_damaged_keys_of_a_file_of_experts(key: str, good: Shards) -> None:
    damaged = rewrite(good.experts[0], good.folder / "damaged.gguf", ids(key, [1]))
    with refused(good.folder, f"damaged.gguf: .*{key}|another model"):
        good.merge(good.trunk, damaged, good.experts[1])
    with refused(good.folder, f"damaged.gguf: .*{key}|another model"):
        moeshard.Model(trunk=good.trunk, experts=damaged)


TENSORS = "moeshard.tensors"


def strings(change: Callable[[list[str]], list[str]]) -> Callable[[list[str]], Gguf]:
    return lambda names: Gguf().array(TENSORS, gb.STRING, list[object](change(names)))


DIRECTORIES: dict[str, tuple[Callable[[list[str]], Gguf | None], str]] = {
    "missing": (lambda names: None, f"{TENSORS} is missing"),
    "of another type": (lambda names: Gguf().array(TENSORS, gb.U32, [1]), f"'{TENSORS}' should be"),
    "unknown name": (strings(lambda names: [*names, "more"]), "there is no tensor 'more'"),
    "a name twice": (strings(lambda names: [*names, names[0]]), f"{TENSORS} names 'token_embd.weight' twice"),
    "an expert too few": (strings(lambda names: names[:-1]), f"{TENSORS} does not name 'blk.1"),
    "a trunk too few": (strings(lambda names: names[1:]), f"{TENSORS} does not name 'token_embd"),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_damaged_list_of_tensors(case: str, good: Shards) -> None:
    change, message = DIRECTORIES[case]
    names = list(GGUFMap(good.model).tensors)
    damaged = rewrite(good.trunk, good.folder / "damaged.gguf", {TENSORS: change(names)})
    with refused(good.folder, f"damaged.gguf: .*{message}"):
        good.merge(damaged, *good.experts)
    with refused(good.folder, f"damaged.gguf: .*{message}"):
        _core.join_segments(GGUFMap(damaged), GGUFMap(good.experts[0]))


def test_damaged_tables(tmp_path: Path) -> None:
    source = new_source("deepseek4", 1, 8, [2], 32, 3)
    source.gguf.kv("deepseek4.expert_gating_func", gb.U32, 4)
    source.gguf.tensors = small_source(1).gguf.tensors
    add_table(source, np.random.default_rng(0), 0, 9)
    model = source.write(tmp_path / "model.gguf")
    shards = [Path(s.paths[0]) for s in moeshard.split(model, ["0-3", "4-7"], tmp_path)]
    key = "moeshard.source.tensor.blk.0.ffn_gate_tid2eid.weight"
    original = GGUFMap(shards[0]).metadata[key].tolist()
    for change in (
        Gguf().array(key, gb.I32, original[:-1]),
        Gguf().array(key, gb.I32, []),
        Gguf().array(key, gb.U32, original),
        Gguf().array(key, gb.F32, [float(i) for i in original]),
        Gguf().kv(key, gb.STRING, "table"),
    ):
        damaged = rewrite(shards[0], tmp_path / "damaged.gguf", {key: change})
        with refused(tmp_path, f"damaged.gguf: '{key}' is not the table of a shard"):
            moeshard.merge([damaged, shards[1]], tmp_path / "merged.gguf")
    moeshard.merge(shards, tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == model.read_bytes()
