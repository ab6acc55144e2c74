"""What cannot become shards, or shards a model again: a named error beside a good twin, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_files import Source, add, add_experts, add_table, gb, keep_of, new_source, refused, small_source

import moeshard
from moeshard import GGUFMap, _core

EVEN, ODD = (0, 2, 4, 6), (1, 3, 5, 7)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_source().write(tmp_path / "model.gguf")


def grouped() -> Source:
    """Four groups of four experts, two of which are searched."""
    source = new_source("deepseek2", 1, 16, [3], 32, 3)
    source.gguf.tensors = small_source(1, 16).gguf.tensors
    source.gguf.kv("deepseek2.expert_group_count", gb.U32, 4).kv("deepseek2.expert_group_used_count", gb.U32, 2)
    return source


def hashed(largest: int = 7, kind: str = "i32") -> Source:
    """One layer whose experts are looked up."""
    source = new_source("deepseek4", 1, 8, [2], 32, 3)
    source.gguf.kv("deepseek4.expert_gating_func", gb.U32, 4)
    source.gguf.tensors = small_source(1).gguf.tensors
    add_table(source, np.random.default_rng(0), 0, 9)
    table = source.gguf.tensors[-1]
    ids = np.frombuffer(table.data, np.int32).copy()
    ids[5] = largest
    table.data = ids.astype("i8" if kind == "i64" else "i4").tobytes()
    table.type = gb.TYPES[kind][0]
    return source


# Keeps

KEEPS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "expert out of range": ("0-8", {}, "out of range|does not exist|has 8 experts"),
    "one layer too many": (np.ones((3, 8), dtype=bool), {}, r"\(3, 8\)"),
    "one expert too many": (np.ones((2, 9), dtype=bool), {}, r"\(2, 9\)"),
    "uneven": ("0: 0-3\n1: 0-4", {}, "model.gguf: layer 0 keeps 4 experts and layer 1 keeps 5"),
    "nothing in a layer": ("0: 0-3\n1: none", {}, "model.gguf: the keep holds no experts in layer 1"),
    "nothing": ("none", {}, "model.gguf: the keep holds no experts|keeps? (no|0) experts"),
    "fewer than a token uses": ("3", {}, "model.gguf: the keep holds 1 experts of layer 0, but a token uses 2.*clamp"),
    "told to use more": ("0-3", {"n_expert_used": 5}, "n_expert_used: a token cannot use 5 experts where .* holds 4"),
    "files too small": ("0-3", {"max_file_size": 1700}, "model.gguf: .* at most 1700 bytes is too small for tensor '"),
}


@pytest.mark.parametrize("case", KEEPS)
def test_keeps(case: str, model: Path, tmp_path: Path) -> None:
    keep, options, message = KEEPS[case]
    with refused(tmp_path, message):
        moeshard.split(model, keep, tmp_path / "out.gguf", **options)
    with refused(tmp_path, message):
        moeshard.split(model, ["0-3", keep], tmp_path / "folder", **options)


def test_the_good_twins(model: Path, tmp_path: Path) -> None:
    good: list[tuple[Any, dict[str, Any]]] = [
        ("0-3", {}),
        (np.ones((2, 8), dtype=bool), {}),
        ("0: 0-3\n1: 4-7", {}),
        ("3", {"clamp": True}),
        ("0-3", {"n_expert_used": 4}),
        ("0-3", {"max_file_size": 5000}),
    ]
    for i, (keep, options) in enumerate(good):
        (shard,) = moeshard.split(model, keep, tmp_path / f"{i}.gguf", **options)
        moeshard.verify(shard.paths[0], model)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ((0, 1, 4, 5, 8, 9, 12), "layer 0 keeps 2, 2, 2, 1 experts of its 4 groups"),
        ((0, 1, 2, 4, 5, 8, 9, 12, 13), "layer 0 keeps 3, 2, 2, 2 experts of its 4 groups"),
        ((0, 4, 8, 12), "layer 0 keeps too few experts in some groups"),
        ((0, 1, 2, 3), "layer 0 keeps too few experts in some groups"),
    ],
)
def test_groups_that_are_not_held_equally(experts: tuple[int, ...], message: str, tmp_path: Path) -> None:
    source = grouped()
    path = source.write(tmp_path / "model.gguf")
    with refused(tmp_path, f"model.gguf: {message}"):
        moeshard.split(path, keep_of(source, *experts), tmp_path / "out.gguf")
    moeshard.split(path, keep_of(source, 0, 1, 6, 7, 8, 10, 12, 15), tmp_path / "out.gguf")


def test_groups_differ_in_number_between_layers(tmp_path: Path) -> None:
    source = grouped()
    with_entry(source, "block_count", gb.U32, 2)
    source.n_layer, source.used = 2, [3, 3]
    add_experts(source, np.random.default_rng(1), 1, "f32", extras=False)
    path = source.write(tmp_path / "model.gguf")
    keep = keep_of(source, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14)
    moeshard.split(path, keep, tmp_path / "good.gguf")
    keep[1] = [True] * 12 + [False] * 4
    with refused(tmp_path, "layer 1 keeps 4, 4, 4, 0 experts of its 4 groups"):
        moeshard.split(path, keep, tmp_path / "out.gguf")


# Models

NOTHING_TO_TAKE = "model.gguf: has no experts to take out"
TILT = ("blk.0.tilt.weight", (32, 8))


def without_experts(source: Source) -> Source:
    source.gguf.tensors = [tensor for tensor in source.gguf.tensors if b"exps" not in tensor.name]
    source.gguf.tensors = [tensor for tensor in source.gguf.tensors if b"gate_inp" not in tensor.name]
    return source


def with_entry(source: Source, key: str, *value: Any) -> Source:
    g = source.gguf
    g.entries = [entry for entry in g.entries if key.encode() not in entry]
    if value:
        g.kv(f"{source.arch}.{key}", *value)
    return source


def with_tensor(source: Source, name: str, ne: tuple[int, ...], kind: str = "f32") -> Source:
    add(source, np.random.default_rng(2), name, ne, kind)
    return source


MODELS: dict[str, tuple[Callable[[], Source], str]] = {
    "dense": (
        lambda: with_entry(without_experts(small_source()), "expert_count"),
        "model.gguf: has no experts to take out: it is a dense model",
    ),
    "no experts but a count": (lambda: without_experts(small_source()), NOTHING_TO_TAKE),
    "a count of zero": (lambda: with_entry(small_source(), "expert_count", gb.U32, 0), "'blk.0.ffn_gate_inp.weight'"),
    "other count": (lambda: with_entry(small_source(), "expert_count", gb.U32, 4), "should have 4 experts"),
    "undecided": (lambda: with_tensor(small_source(), *TILT), "'blk.0.tilt.weight'.*may depend on the 8 experts"),
    "unknown part": (lambda: with_tensor(small_source(), "blk.0.ffn_up_exps.tilt", (8,)), "'blk.0.ffn_up_exps.tilt'"),
    "top-k of another type": (
        lambda: with_entry(small_source(), "expert_used_count", gb.F32, 2.0),
        "expert_used_count' should be an integer",
    ),
    "ids of another type": (lambda: hashed(kind="i64"), "'blk.0.ffn_gate_tid2eid.weight' holds expert ids as i64"),
    "an id that is no expert": (lambda: hashed(largest=8), "holds 8, but the model has only 8 experts"),
    "a negative id": (lambda: hashed(largest=-1), "holds -1, but the model has only 8 experts"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, tmp_path: Path) -> None:
    make, message = MODELS[case]
    path = make().write(tmp_path / "model.gguf")
    with refused(tmp_path, message):
        moeshard.split(path, "0-3", tmp_path / "out.gguf")


def test_models_that_are_good_twins(tmp_path: Path) -> None:
    sources = (hashed(), with_tensor(small_source(), "blk.0.tilt.weight", (3, 5)), grouped())
    for i, source in enumerate(sources):
        path = source.write(tmp_path / f"model {i}.gguf")
        moeshard.split(path, "0-1,4-5,8-9,12-13" if source.n_expert == 16 else "0-3", tmp_path / f"{i}.gguf")


def test_more_ids_than_a_table_holds(tmp_path: Path) -> None:
    path = hashed().write(tmp_path / "model.gguf")
    with refused(tmp_path, "layer 0 looks 2 experts per token up in a table, so a shard cannot use 3"):
        moeshard.split(path, "0-3", tmp_path / "out.gguf", n_expert_used=3)
    moeshard.split(path, "0-3", tmp_path / "out.gguf", n_expert_used=1)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda data: data[:100], "ends|more than fit"),
        (lambda data: data[:-4000], "past the end of the file"),
        (lambda data: b"GGML" + data[4:], "not a GGUF file"),
        (lambda data: b"", "is empty"),
    ],
)
def test_damaged_models(cut: Callable[[bytes], bytes], message: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.gguf").write_bytes(cut(model.read_bytes()))
    with refused(tmp_path, f"damaged.gguf: .*({message})"):
        moeshard.split(tmp_path / "damaged.gguf", "0-3", tmp_path / "out.gguf")


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        paths.append(small_source(seed=i).write_parts(tmp_path / str(i), 3, version=i))
    moeshard.split(paths[0], "0-3", tmp_path / "good.gguf")

    second = paths[0].with_name("model-00002-of-00003.gguf")
    data = second.read_bytes()
    second.write_bytes(data.replace(b"split.no\x02\0\0\0\1", b"split.no\x02\0\0\0\2"))
    with refused(tmp_path, "00002-of-00003.gguf: does not say that it is part 1"):
        moeshard.split(paths[0], "0-3", tmp_path / "out.gguf")
    second.unlink()
    with refused(tmp_path, "00002-of-00003.gguf: part 2 of 3 is missing"):
        moeshard.split(paths[0], "0-3", tmp_path / "out.gguf")
    second.write_bytes((tmp_path / "1" / second.name).read_bytes())
    with refused(tmp_path, "00002-of-00003.gguf: metadata key 'general.version' differs"):
        moeshard.split(paths[0], "0-3", tmp_path / "out.gguf")


def test_a_shard_is_not_split(model: Path, tmp_path: Path) -> None:
    moeshard.split(model, ["0-3", "4-7"], tmp_path, trunk_once=True)
    moeshard.split(model, "0-3", tmp_path / "shard.gguf")
    for name in ("shard.gguf", "trunk.gguf", "model.group-0.gguf"):
        with refused(tmp_path, f"{name}: (is itself a shard|has no experts to take out)"):
            moeshard.split(tmp_path / name, "0-1", tmp_path / "out.gguf")


def test_arguments_of_the_core(model: Path, tmp_path: Path) -> None:
    file = GGUFMap(model)
    keep = keep_of(small_source(), *EVEN)
    (segments,) = _core.shard_segments(file, keep)
    with refused(tmp_path, "kind must be 'shard', 'trunk' or 'experts', got 'slice'"):
        _core.shard_segments(file, keep, kind="slice")
    with refused(tmp_path, "a shard needs a keep"):
        _core.shard_segments(file, None)
    with refused(tmp_path, "2 files need as many paths, got 1"):
        _core.write_segments([segments, segments], [tmp_path / "out.gguf"])
    for offset, size in ((segments.size, 1), (0, segments.size + 1), (2**63, 2**63), (segments.size + 1, 0)):
        with refused(tmp_path, "reaches past the end of the shard"):
            segments.read(offset, size)
    assert segments.read(segments.size, 0) == b""
