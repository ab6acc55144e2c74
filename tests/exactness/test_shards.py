"""Shards of every MoE architecture, in stock llama.cpp and streamed: what the masked whole model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from compare import Keep, assert_same_bits, largest_difference, random_partition
from results import rounding
from sharding import AS_RUN, Whole
from specimens import SPECIMENS

import moeshard
from moeshard import _core

Make = Callable[..., Path]
GROUPED = [name for name in SPECIMENS if "+grouped" in name]


@pytest.fixture(scope="module", params=SPECIMENS)
def whole(
    request: pytest.FixtureRequest, make: Make, programs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Whole]:
    yield Whole(request.param, make, programs, tmp_path_factory.mktemp("shards"))
    for experts in (None, "f32"):
        make(request.param, experts).unlink()


@contextmanager
def result(whole: Whole, table: dict[str, dict[str, str]], column: str) -> Iterator[dict[str, str]]:
    """The column of the table that the block decides, or names a result for."""
    cells = table.setdefault(whole.name, {})
    cells[column] = "fails"
    yield cells
    if cells[column] == "fails":
        cells[column] = "exact" if whole.exact else rounding(whole.tolerance)


def first_experts(whole: Whole, n_keep: int) -> Keep:
    keep = np.zeros((whole.layout.n_layer, whole.layout.n_expert), dtype=bool)
    keep[:, :n_keep] = True
    return keep


def partition(whole: Whole, n_shards: int) -> np.ndarray:
    rng = np.random.default_rng(n_shards)
    layout = whole.layout
    return random_partition(rng, layout.n_layer, layout.n_expert, n_shards, max(layout.n_expert_groups, 1))


def check_together(whole: Whole, keeps: np.ndarray) -> None:
    """Shards that hold everything give back the file; a trunk and a file of experts are a shard."""
    shards = [whole.write(whole.segments(keep), str(i)) for i, keep in enumerate(keeps)]
    (merged,) = _core.merge_segments([_core.GGUFMap(path) for path in shards])
    assert _core.first_difference(merged, whole.path) is None
    (trunk,) = _core.shard_segments(whole.map, None, kind="trunk")
    (experts,) = _core.shard_segments(whole.map, keeps[0], kind="experts")
    parts = [_core.GGUFMap(whole.write(trunk, "trunk")), _core.GGUFMap(whole.write(experts, "experts"))]
    assert _core.first_difference(_core.join_segments(*parts), shards[0]) is None
    for path in whole.folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("n_shards", [2, 4])
def test_shards(whole: Whole, n_shards: int, table: dict[str, dict[str, str]]) -> None:
    column = f"{n_shards} shards"
    with result(whole, table, column) as cells:
        keeps = partition(whole, n_shards)
        if whole.layout.experts_per_chunk > 1:
            for keep in keeps:
                with pytest.raises(moeshard.MoeshardError, match=r"weights its chunks of 2 experts .*such as 0-7\)"):
                    whole.segments(keep)
            cells[column] = "refused"
            return
        for keep in keeps:
            whole.check(keep)
        check_together(whole, keeps)


@pytest.mark.parametrize("name", GROUPED)
def test_shards_without_some_expert_groups(name: str, make: Make, programs: Path, tmp_path: Path) -> None:
    """Of 4 groups, 2 of which are searched for each token; a shard that holds 2 has no choice of groups left."""
    whole = Whole(name, make, programs, tmp_path)
    rng = np.random.default_rng(17)
    for n_groups, per_group in [(3, 2), (3, 4), (2, 2), (2, 4)]:
        keep = np.zeros((whole.layout.n_layer, 4, 4), dtype=bool)
        for row in keep:
            for group in rng.choice(4, n_groups, replace=False):
                row[group, rng.choice(4, per_group, replace=False)] = True
        whole.check(keep.reshape(-1, 16))


@pytest.mark.parametrize("name", ["deepseek2", "gpt-oss", "llama4", "qwen3moe"])
def test_any_number_of_experts(name: str, make: Make, programs: Path, tmp_path: Path) -> None:
    whole = Whole(name, make, programs, tmp_path)
    rng = np.random.default_rng(19)
    for n_keep in (4, 5, 7, 10, 12, 15, 16):
        keep = np.zeros((whole.layout.n_layer, 16), dtype=bool)
        for row in keep:
            row[rng.choice(16, n_keep, replace=False)] = True
        whole.check(keep)


def test_chunk_experts_need_the_first_experts(make: Make, programs: Path, tmp_path: Path) -> None:
    """Four experts per token, two experts per chunk: stock llama.cpp aborts on fewer than four chunks."""
    whole = Whole("grovemoe+chunks", make, programs, tmp_path)
    for n_keep in (8, 10, 14):
        whole.check(first_experts(whole, n_keep))
    for refused in (first_experts(whole, 6), first_experts(whole, 9), ~first_experts(whole, 8)):
        with pytest.raises(moeshard.MoeshardError, match="only the first experts, in enough whole chunks"):
            whole.segments(refused)


def test_stock_llama_loads_parts(make: Make, programs: Path, tmp_path: Path) -> None:
    whole = Whole("deepseek2", make, programs, tmp_path)
    keep = partition(whole, 2)[0]
    limit = whole.segments(keep).size // 3
    parts = _core.shard_segments(whole.map, keep, max_file_size=limit)
    assert len(parts) > 2
    assert all(part.size <= limit for part in parts)
    paths = [Path(_core.part_path(str(tmp_path / "shard.gguf"), i, len(parts))) for i in range(len(parts))]
    _core.write_segments(parts, paths)
    assert_same_bits(whole.stock(paths[0]).logits, whole.model.logits(whole.tokens, keep), "logits")


def test_fewer_experts_per_token(make: Make, programs: Path, tmp_path: Path) -> None:
    """A shard that is told to use fewer computes what the whole model does that is told so."""
    whole = Whole("deepseek2", make, programs, tmp_path)
    keep = partition(whole, 4)[0]
    (segments,) = _core.shard_segments(whole.map, keep, n_expert_used=2)
    stock = whole.stock(whole.write(segments))
    assert stock.ids.shape[-1] == 2
    narrow = moeshard.Model(whole.path, n_expert_used=2, n_threads=1)
    assert_same_bits(narrow.logits(whole.tokens, keep), stock.logits, "logits")


@pytest.mark.parametrize("name", ["deepseek2", "qwen3moe", "gemma4", "grok"])
def test_the_tolerances_see_a_wrong_expert(name: str, make: Make, programs: Path, tmp_path: Path) -> None:
    """One expert of one layer that is another one is more than any rounding."""
    whole = Whole(name, make, programs, tmp_path)
    keep = partition(whole, 2)[0]
    last = whole.layout.moe_layers[-1]
    other = keep.copy()
    other[last, np.flatnonzero(keep[last])[0]] = False
    other[last, np.flatnonzero(~keep[last])[0]] = True
    shard = whole.stock(whole.write(whole.segments(other)))
    difference = largest_difference(shard.logits, whole.model.logits(whole.tokens, keep))
    assert difference > 2 * max(AS_RUN, whole.tolerance)
