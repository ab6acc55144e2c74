"""Shards byte by byte, of models of every kind that a test can make up, beside the independent gguf package."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import Keep, Source, add_table, gb, keep_of, new_source, partitions, small_source, sources

import moeshard
from moeshard import GGUFMap, _core
from moeshard._core import SegmentList
from moeshard.shards.verify import lay_out_again

NOTES = [("fingerprint", "of this model")]
several = settings(deadline=None, max_examples=40)


@contextmanager
def folder() -> Iterator[Path]:
    """One for each example, with a name that needs quoting."""
    with tempfile.TemporaryDirectory(prefix="größe 7 ") as path:
        yield Path(path)


def shard(model: GGUFMap, keep: Keep | None, **options: Any) -> list[SegmentList]:
    return _core.shard_segments(model, keep, notes=NOTES, **options)


def write(files: list[SegmentList], path: Path) -> GGUFMap:
    paths = [str(path)] if len(files) == 1 else [_core.part_path(str(path), i, len(files)) for i in range(len(files))]
    _core.write_segments(files, paths)
    for segments, name in zip(files, paths, strict=True):
        assert os.path.getsize(name) == segments.size
        assert _core.first_difference(segments, name) is None
    return GGUFMap(paths[0])


def check_tiling(segments: SegmentList, alignment: int) -> None:
    """Segments follow each other without gaps, and make the file together."""
    rows = segments.segments
    assert rows[0][1] == 0
    assert all(a[1] + a[2] == b[1] for a, b in pairwise(rows))
    assert sum(size for _, _, size, _, _ in rows) == segments.size == rows[-1][1] + rows[-1][2]
    assert all(size > 0 for _, _, size, _, _ in rows)
    assert segments.header_size % alignment == segments.size % alignment == 0


def check_reads(segments: SegmentList, path: str, seed: int) -> None:
    """Any range can be read without the file."""
    data = Path(path).read_bytes()
    rng = random.Random(seed)
    for _ in range(30):
        begin = rng.randint(0, len(data))
        size = rng.randint(0, min(len(data) - begin, rng.choice([3, 40, len(data)])))
        assert segments.read(begin, size) == data[begin : begin + size]


def entries(file: GGUFMap) -> dict[str, bytes]:
    """The encoded entries of a file's metadata."""
    data = Path(file.parts[0].path).read_bytes()
    return {key: data[at : at + size] for key, (at, size) in file.parts[0].entry_ranges.items()}


def check_metadata(source: Source, whole: dict[str, bytes], file: GGUFMap, keep: Keep) -> None:
    held = entries(file)
    own = {key for key in held if key.startswith(("moeshard.", "split."))}
    assert [key for key in held if key not in own] == list(whole)
    count_key = f"{source.arch}.expert_count"
    n_keep = int(keep[source.expert_layers[0]].sum())
    assert file.metadata[count_key] == n_keep
    changed = {key for key in whole if held[key] != whole[key]}
    assert changed == ({count_key} if n_keep < source.n_expert else set())
    for key in changed:
        assert file.metadata[f"moeshard.source.{key}"] == source.n_expert
    assert file.metadata["moeshard.kind"] == "shard"
    assert file.metadata["moeshard.experts"] == source.n_expert
    assert file.metadata["moeshard.fingerprint"] == "of this model"
    assert file.metadata["moeshard.layers"].tolist() == source.expert_layers
    kept = [expert for layer in source.expert_layers for expert in np.flatnonzero(keep[layer])]
    assert file.metadata["moeshard.kept"].tolist() == kept
    facts = _core.shard_facts(file)
    assert facts is not None
    np.testing.assert_array_equal(facts.keep[source.expert_layers], keep[source.expert_layers])


def check_tensors(source: Source, file: GGUFMap, keep: Keep) -> None:
    """As the gguf package reads them."""
    found = [(part, tensor) for part in file.parts for tensor in gguf.GGUFReader(part.path).tensors]
    assert [tensor.name for _, tensor in found] == [tensor.name.decode() for tensor in source.gguf.tensors]
    for (part, tensor), like in zip(found, source.gguf.tensors, strict=True):
        assert tensor.data.tobytes() == source.expected(tensor.name, keep), tensor.name
        assert tensor.tensor_type == like.type
        assert (tensor.data_offset - part.data_offset) % source.gguf.alignment == 0
        ne = list(like.ne)
        if tensor.name in source.layer_of:
            ne[-1] = int(keep[source.layer_of[tensor.name]].sum())
        assert tensor.shape.tolist() == ne


@several
@given(st.data())
def test_a_shard_holds_its_experts_and_all_else(data: st.DataObject) -> None:
    source = data.draw(sources())
    keep = data.draw(partitions(source))[0]
    with folder() as tmp:
        model = GGUFMap(source.write(tmp / "model.gguf"))
        (segments,) = shard(model, keep)
        check_tiling(segments, source.gguf.alignment)
        file = write([segments], tmp / "a shard.gguf")
        assert (file.parts[0].version, file.parts[0].alignment) == (source.gguf.version, source.gguf.alignment)
        check_metadata(source, entries(model), file, keep)
        check_tensors(source, file, keep)
        check_reads(segments, file.path, data.draw(st.integers(0, 2**16)))
        assert segments.moe_layout().n_expert == file.moe_layout().n_expert


@several
@given(st.data())
def test_shards_make_the_model_again(data: st.DataObject) -> None:
    source = data.draw(sources())
    keeps = data.draw(partitions(source))
    with folder() as tmp:
        model = GGUFMap(source.write(tmp / "model.gguf"))
        shards = [write(shard(model, keep), tmp / f"{i}.gguf") for i, keep in enumerate(keeps)]
        (merged,) = _core.merge_segments(data.draw(st.permutations(shards)))
        check_tiling(merged, source.gguf.alignment)
        assert _core.first_difference(merged, model.path) is None
        assert Path(write([merged], tmp / "again.gguf").path).read_bytes() == Path(model.path).read_bytes()


@several
@given(st.data())
def test_a_trunk_and_files_of_experts(data: st.DataObject) -> None:
    source = data.draw(sources())
    keeps = data.draw(partitions(source))
    with folder() as tmp:
        model = GGUFMap(source.write(tmp / "model.gguf"))
        trunk = write(shard(model, None, kind="trunk"), tmp / "trunk.gguf")
        experts = [write(shard(model, keep, kind="experts"), tmp / f"{i}.gguf") for i, keep in enumerate(keeps)]
        depend = {*source.layer_of, *source.tables}
        assert set(trunk.tensors) == {tensor.name.decode() for tensor in source.gguf.tensors} - depend
        for file, keep in zip(experts, keeps, strict=True):
            assert set(file.tensors) == depend
            joined = _core.join_segments(trunk, file)
            (whole,) = shard(model, keep)
            assert joined.read(0, joined.size) == whole.read(0, whole.size)
        (merged,) = _core.merge_segments(data.draw(st.permutations([trunk, *experts])))
        assert _core.first_difference(merged, model.path) is None


@several
@given(st.data())
def test_parts_in_and_parts_out(data: st.DataObject) -> None:
    source = data.draw(sources())
    keeps = data.draw(partitions(source))
    with folder() as tmp:
        single = GGUFMap(source.write(tmp / "model.gguf"))
        n_parts = data.draw(st.integers(2, min(5, len(source.gguf.tensors))))
        model = GGUFMap(source.write_parts(tmp, n_parts))
        assert len(model.parts) == n_parts
        shards = []
        for i, keep in enumerate(keeps):
            (whole,) = shard(model, keep)
            (same,) = shard(single, keep)
            assert whole.read(0, whole.size) == same.read(0, same.size)
            largest = max(info.nbytes for info in single.tensor_infos)
            limit = data.draw(st.integers(min(largest + 12_000, whole.size), whole.size))
            files = shard(model, keep, max_file_size=limit)
            assert all(file.size <= limit for file in files)
            for file in files:
                check_tiling(file, source.gguf.alignment)
            shards.append(write(files, tmp / f"shard {i}.gguf"))
            check_tensors(source, shards[-1], keep)
            check_metadata(source, entries(single), shards[-1], keep)
        (merged,) = _core.merge_segments(shards)
        assert _core.first_difference(merged, single.path) is None
        divided = _core.merge_segments(shards, max_file_size=merged.size - 1)
        again = write(divided, tmp / "again.gguf")
        assert len(again.parts) > 1
        (back,) = _core.merge_segments([write(shard(again, np.ones_like(keeps[0])), tmp / "all.gguf")])
        assert _core.first_difference(back, single.path) is None


@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_the_embedded_model(data: st.DataObject, tinymoe: Path) -> None:
    model = GGUFMap(tinymoe)
    n_shards = data.draw(st.sampled_from([1, 2, 3, 5]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    keeps = np.zeros((n_shards, 5, 128), dtype=bool)
    for layer in range(5):
        for number, hand in enumerate(np.array_split(rng.permutation(128), n_shards)):
            keeps[number, layer, hand] = True
    with folder() as tmp:
        shards = [write(shard(model, keep), tmp / f"{i}.gguf") for i, keep in enumerate(keeps)]
        for file, keep in zip(shards, keeps, strict=True):
            for tensor in gguf.GGUFReader(file.path).tensors:
                theirs, ours = model.tensors[tensor.name], tensor.data
                layer = int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else -1
                depends = "_exps" in tensor.name or "gate_inp" in tensor.name
                np.testing.assert_array_equal(ours, theirs[keep[layer]] if depends else theirs)
        (merged,) = _core.merge_segments(shards)
        assert _core.first_difference(merged, tinymoe) is None


def test_other_bytes_in_place(tmp_path: Path) -> None:
    """Inside a segment, over several, over what was replaced before, and nothing at all."""
    model = GGUFMap(small_source(2, 8).write(tmp_path / "model.gguf"))
    (segments,) = shard(model, keep_of(small_source(2, 8), 1, 2, 4, 7))
    wanted = bytearray(segments.read(0, segments.size))
    borders = [offset for _, offset, _, _, _ in segments.segments]
    assert len(borders) > 4
    rng = random.Random(3)
    places = [(0, 4), (segments.size - 3, 3), (segments.size, 0), (borders[1] - 1, 2), (borders[2] - 2, 300)]
    places += [(offset, rng.randrange(200)) for offset in rng.choices(range(segments.size - 200), k=40)]
    replacements = [(offset, rng.randbytes(size)) for offset, size in places]
    for offset, new in replacements:
        wanted[offset : offset + len(new)] = new
    replaced = segments.with_bytes(replacements)
    assert replaced.read(0, replaced.size) == wanted
    check_tiling(replaced, model.parts[0].alignment)
    assert segments.read(0, segments.size) != wanted, "the original is as it was"
    for offset, size in [(segments.size - 1, 2), (segments.size + 1, 0), (2**64 - 1, 3)]:
        with pytest.raises(moeshard.MoeshardError, match="reach past the end"):
            segments.with_bytes([(offset, bytes(size))])


@pytest.mark.parametrize("n_used", [0, 1])
def test_a_long_table_is_converted_wherever_it_is_read(n_used: int, tmp_path: Path) -> None:
    """Longer than the blocks in which it is converted."""
    source = new_source("deepseek4", 1, 16, [3], 32, 3)
    source.gguf.kv("deepseek4.expert_gating_func", gb.U32, 4)
    add_table(source, np.random.default_rng(0), 0, 40_001)
    name = next(iter(source.tables))
    keep = keep_of(source, 0, 3, 4, 9, 15)
    (segments,) = shard(GGUFMap(source.write(tmp_path / "model.gguf")), keep, n_expert_used=n_used)
    file = write([segments], tmp_path / "shard.gguf")
    # Of fewer ids only those that are used are looked at.
    assert file.tensors[name].tobytes() == source.expected(name, keep, n_used or None)
    check_reads(segments, file.path, 1)
    (merged,) = _core.merge_segments(
        [file, write(shard(GGUFMap(tmp_path / "model.gguf"), ~keep), tmp_path / "rest.gguf")]
    )
    assert _core.first_difference(merged, tmp_path / "model.gguf") is None


SCALAR, LIST = "qwen3moe", "nemotron_h_moe"


@pytest.mark.parametrize(
    ("arch", "used", "options", "expected"),
    [
        (SCALAR, [2, 2, 2], {}, 2),
        (SCALAR, [2, 2, 2], {"clamp": True}, 2),
        (SCALAR, [2, 2, 2], {"n_expert_used": 3}, 3),
        (SCALAR, [6, 6, 6], {"clamp": True}, 4),
        (SCALAR, [2, 2, 2], {"clamp": True, "n_expert_used": 5}, 4),
        (LIST, [2, 0, 3], {}, [2, 0, 3]),
        (LIST, [2, 0, 3], {"n_expert_used": 1}, [1, 0, 1]),
        (LIST, [2, 0, 6], {"clamp": True}, [2, 0, 4]),
        (LIST, [2, 0, 3], {"clamp": True, "n_expert_used": 5}, [4, 0, 4]),
    ],
)
def test_experts_per_token(
    arch: str, used: list[int], options: dict[str, Any], expected: int | list[int], tmp_path: Path
) -> None:
    """Of shards that hold 4 of 8 experts."""
    source = new_source(arch, 3, 8, used, 32, 3)
    tensors = small_source(3).gguf.tensors
    source.gguf.tensors = [t for t in tensors if not t.name.startswith(b"blk.1.") or used[1]]
    model = GGUFMap(source.write(tmp_path / "model.gguf"))
    keep = keep_of(source, 1, 2, 4, 7)
    shards = [write(shard(model, half, **options), tmp_path / f"{half[0, 1]}.gguf") for half in (keep, ~keep)]
    key = f"{arch}.expert_used_count"
    for file in shards:
        np.testing.assert_array_equal(file.metadata[key], expected)
        is_changed = entries(file)[key] != entries(model)[key]
        assert (f"moeshard.source.{key}" in file.metadata) == is_changed
        assert len(entries(file)[key]) == len(entries(model)[key])  # the same type
        facts = _core.shard_facts(file)
        assert facts is not None
        (again,) = lay_out_again(model, file, facts)  # from nothing but what the file says
        assert _core.first_difference(again, file.path) is None
    (merged,) = _core.merge_segments(shards)
    assert _core.first_difference(merged, model.path) is None


def test_groups_that_are_not_held(tmp_path: Path) -> None:
    """What remains of four groups, two of which are searched for each token."""
    source = new_source("deepseek2", 1, 16, [2], 32, 3)
    source.gguf.tensors = small_source(1, 16).gguf.tensors
    source.gguf.kv("deepseek2.expert_group_count", gb.U32, 4).kv("deepseek2.expert_group_used_count", gb.U32, 2)
    model = GGUFMap(source.write(tmp_path / "model.gguf"))
    for experts, counts in [
        (range(16), (4, 2)),
        ((0, 3, 4, 6, 8, 9, 14, 15), (4, 2)),
        ((0, 3, 4, 6, 14, 15), (3, 2)),
        ((0, 1, 2, 3, 12, 13, 14, 15), (1, 1)),  # two are left, and both are searched
    ]:
        path = tmp_path / f"{len(experts)} {counts}.gguf"
        file = write(shard(model, keep_of(source, *experts)), path)
        found = tuple(file.metadata[f"deepseek2.expert_group_{key}"] for key in ("count", "used_count"))
        assert found == counts
        assert ("moeshard.source.deepseek2.expert_group_count" in file.metadata) == (counts[0] != 4)
