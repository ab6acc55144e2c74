"""A model that llama-gguf-split put together says so in entries of its own; they come back with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_files import gb, small_source

import moeshard


@pytest.mark.parametrize("trunk_once", [False, True])
def test_it_comes_back_byte_for_byte(tmp_path: Path, trunk_once: bool) -> None:
    source = small_source()
    # What llama-gguf-split --merge leaves behind in the metadata.
    source.gguf.kv("split.no", gb.U16, 0).kv("split.tensors.count", gb.I32, 27).kv("split.count", gb.U16, 0)
    model = tmp_path / "model.gguf"
    source.write(model)
    moeshard.split(model, moeshard.plan_groups(model, 2), tmp_path / "s", trunk_once=trunk_once)
    shards = sorted((tmp_path / "s").glob("*.gguf"))
    for shard in shards:
        moeshard.verify(shard, model)
    moeshard.merge(shards, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == model.read_bytes()
