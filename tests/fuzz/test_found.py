"""Files that the fuzz target found, or that showed what it should look for; each beside a good twin."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard import GGUFMap, _core

sys.path.insert(0, str(Path(__file__).parents[1] / "gguf"))

import gguf_bytes as gb
from gguf_bytes import Gguf

N_EXPERT = 8


def keep_of(n_layer: int, experts: range) -> np.ndarray:
    keep = np.zeros((n_layer, N_EXPERT), dtype=bool)
    keep[:, list(experts)] = True
    return keep


def write(g: Gguf, path: Path) -> GGUFMap:
    path.write_bytes(g.build())
    return GGUFMap(path)


def model(n_layer: int = 1, arch: str = "qwen3moe") -> Gguf:
    return gb.moe_tensors(gb.model(arch, n_layer=n_layer, n_expert=N_EXPERT), range(n_layer), n_expert=N_EXPERT)


def pieces(of: GGUFMap, folder: Path) -> list[GGUFMap]:
    """Write both halves of a model."""
    made = []
    for i, experts in enumerate([range(4), range(4, N_EXPERT)]):
        path = folder / f"half{i}.gguf"
        (list_,) = _core.shard_segments(of, keep_of(of.moe_layout().n_layer, experts), clamp=True)
        _core.write_segments([list_], [path])
        made.append(GGUFMap(path))
    return made


@pytest.mark.parametrize("ne", [(5, 3), (12, 3)], ids=["of no multiple", "of a multiple of the kept experts"])
def test_unknown_parts_of_the_trunk_stay_trunk_in_a_shard(ne: tuple[int, ...], tmp_path: Path) -> None:
    whole = write(model().tensor("blk.0.something.weight", ne), tmp_path / "model.gguf")
    halves = pieces(whole, tmp_path)
    assert [half.moe_layout().n_expert for half in halves] == [4, 4]
    (merged,) = _core.merge_segments(halves)
    assert merged.read(0, merged.size) == Path(whole.path).read_bytes()


def hashed(*used: int, rows: int = 9) -> Gguf:
    """A model of two layers, the first of which looks experts up."""
    g = Gguf().kv("general.architecture", gb.STRING, "deepseek4").kv("deepseek4.block_count", gb.U32, 2)
    g.kv("deepseek4.expert_count", gb.U32, N_EXPERT).kv("deepseek4.expert_gating_func", gb.U32, 4)
    g.array("deepseek4.expert_used_count", gb.U32, list(used))
    gb.moe_tensors(g, range(2), n_expert=N_EXPERT).tensor("blk.0.ffn_gate_tid2eid.weight", (used[0], rows), "i32")
    ids = np.arange(used[0] * rows, dtype=np.int32) % N_EXPERT
    g.tensors[-1].data = ids.tobytes()
    return g


@pytest.mark.parametrize(("rows", "used"), [(9, 2), (0, 2), (9, 0)], ids=["good", "no rows", "no ids"])
def test_tables_of_no_ids(rows: int, used: int, tmp_path: Path) -> None:
    whole = write(hashed(used, 2, rows=rows), tmp_path / "model.gguf")
    if rows and used:
        assert whole.moe_layout().hash_layers == [0]
    else:
        with pytest.raises(moeshard.MoeshardError, match=f"should hold the ids of {used} experts per token"):
            whole.moe_layout()


def test_a_table_of_another_file(tmp_path: Path) -> None:
    key = "moeshard.source.tensor.blk.0.ffn_gate_tid2eid.weight"
    shards = []
    for name, g in {"good": hashed(2, 2), "stray": hashed(2, 2).array(key, gb.I32, [7] * 36)}.items():
        (shard,) = _core.shard_segments(write(g, tmp_path / f"{name}.gguf"), keep_of(2, range(4)))
        shards.append(shard.read(shard.header_size, shard.size - shard.header_size))
    assert shards[0] == shards[1]


def test_used_experts_of_a_layer_that_has_none(tmp_path: Path) -> None:
    g = Gguf().kv("general.architecture", gb.STRING, "lfm2moe").kv("lfm2moe.block_count", gb.U32, 2)
    g.kv("lfm2moe.expert_count", gb.U32, N_EXPERT).kv("lfm2moe.expert_gating_func", gb.U32, 1)
    g.array("lfm2moe.expert_used_count", gb.U32, [6, 2])
    whole = write(gb.moe_tensors(g, range(1, 2), n_expert=N_EXPERT), tmp_path / "model.gguf")
    halves = pieces(whole, tmp_path)
    assert halves[0].metadata["lfm2moe.expert_used_count"].tolist() == [4, 2]
    (merged,) = _core.merge_segments(halves)
    assert merged.read(0, merged.size) == Path(whole.path).read_bytes()


def test_parts_that_cannot_hold_the_header_of_a_trunk_without_tensors(tmp_path: Path) -> None:
    whole = write(model(), tmp_path / "model.gguf")
    (trunk,) = _core.shard_segments(whole, None, kind="trunk")
    assert len(_core.shard_segments(whole, None, kind="trunk", max_file_size=trunk.size)) == 1
    with pytest.raises(moeshard.MoeshardError, match="too small for a header of [0-9]+ bytes"):
        _core.shard_segments(whole, None, kind="trunk", max_file_size=trunk.size - 1)


@pytest.mark.parametrize("kind", [gb.U32, gb.U8], ids=["good", "of a type too small"])
def test_a_count_that_its_key_cannot_hold(kind: int, tmp_path: Path) -> None:
    n_expert = 512
    g = Gguf().kv("general.architecture", gb.STRING, "qwen3moe").kv("qwen3moe.block_count", gb.U32, 1)
    g.kv("qwen3moe.expert_count", gb.U32, n_expert).kv("qwen3moe.expert_used_count", kind, 2)
    whole = write(gb.moe_tensors(g, range(1), n_expert=n_expert, n_ff=1), tmp_path / "model.gguf")
    keep = np.ones((1, n_expert), dtype=bool)
    if kind == gb.U32:
        (shard,) = _core.shard_segments(whole, keep, n_expert_used=300)
        assert shard.moe_layout().n_expert_used == [300]
    else:
        with pytest.raises(moeshard.MoeshardError, match=r"model\.gguf: .*is of type uint8, which cannot hold 300"):
            _core.shard_segments(whole, keep, n_expert_used=300)


def shard(layers: list[int], kept: list[int], chunk: int = 0, n_expert: int = 4) -> Gguf:
    """Four of `n_expert` experts in each of two layers, as `layers` and `kept` say or not."""
    g = gb.model("grovemoe", n_layer=2, n_expert=4).kv("moeshard.kind", gb.STRING, "shard")
    g.kv("moeshard.experts", gb.U32, n_expert).array("moeshard.layers", gb.U32, layers)
    g.array("moeshard.kept", gb.U32, kept).kv("moeshard.source.grovemoe.expert_count", gb.U32, n_expert)
    if chunk:
        g.kv("grovemoe.experts_per_group", gb.U32, chunk).tensor("blk.0.ffn_up_chexps.weight", (32, 1, 4 // chunk))
    return gb.moe_tensors(g, range(2))


@pytest.mark.parametrize("layers", [[0, 1], [0], [1], []], ids=str)
def test_facts_name_the_layers_that_the_file_has(layers: list[int], tmp_path: Path) -> None:
    file = write(shard(layers, [0, 1, 2, 3] * len(layers)), tmp_path / "shard.gguf")
    if layers == [0, 1]:
        assert len(_core.merge_segments([file])) == 1
    else:
        with pytest.raises(moeshard.MoeshardError, match=r"moeshard\.layers does not name the layers"):
            _core.merge_segments([file])


@pytest.mark.parametrize(
    ("kept", "chunks", "message"),
    [
        ([[0, 1, 4, 5], [2, 3, 6, 7]], [2, 2], None),
        ([[0, 1, 4, 5], [2, 3, 6, 7]], [2, 4], "expert 1 is in none of the files"),
        ([[0, 2, 4, 6], [1, 3, 5, 7]], [2, 2], "holds fewer experts than the file says"),
    ],
    ids=["good", "chunks of other sizes", "chunks that are not whole"],
)
def test_chunks_of_experts(kept: list[list[int]], chunks: list[int], message: str | None, tmp_path: Path) -> None:
    files = [
        write(shard([0, 1], ids * 2, chunk, n_expert=8), tmp_path / f"{i}.gguf")
        for i, (ids, chunk) in enumerate(zip(kept, chunks, strict=True))
    ]
    if message is None:
        (merged,) = _core.merge_segments(files)
        assert merged.moe_layout().tensors
    else:
        with pytest.raises(moeshard.MoeshardError, match=message):
            _core.merge_segments(files)


@pytest.mark.parametrize("arch", [b"qwen3moe", b"qwen3\nmoe", b"x" * 81], ids=["good", "a new line", "too long"])
def test_architectures_that_messages_cannot_show(arch: bytes, tmp_path: Path) -> None:
    g = Gguf().kv("general.architecture", gb.STRING, arch).kv(arch + b".block_count", gb.U32, 1)
    file = write(g.tensor("x", (4,)), tmp_path / "model.gguf")
    if arch == b"qwen3moe":
        assert file.moe_layout().arch == "qwen3moe"
    else:
        with pytest.raises(moeshard.MoeshardError, match="architecture is '.*', which is no name"):
            file.moe_layout()
