"""Bytes of a shard however they are copied: in pieces, by the kernel, to another file system."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from shard_files import gb

from moeshard import GGUFMap, _core

N_EXPERT = 6
N_FF = 2500  # a slab of 320 kB: more than is copied at once


def model(alignment: int, path: Path) -> GGUFMap:
    g = gb.Gguf(alignment=alignment).kv("general.architecture", gb.STRING, "qwen3moe")
    g.kv("general.alignment", gb.U32, alignment).kv("qwen3moe.block_count", gb.U32, 2)
    g.kv("qwen3moe.expert_count", gb.U32, N_EXPERT).kv("qwen3moe.expert_used_count", gb.U32, 2)
    gb.moe_tensors(g, range(2), n_expert=N_EXPERT, n_ff=1)
    rng = np.random.default_rng(0)
    for tensor in g.tensors:
        tensor.ne = tuple(N_FF if n == 1 else n for n in tensor.ne)
        tensor.data = rng.bytes(4 * int(np.prod(tensor.ne)))
    path.write_bytes(built(g))
    return GGUFMap(path)


def built(g: gb.Gguf) -> bytes:
    """Like Gguf.build(), which leaves data beyond the first megabyte out."""
    header = g.header()
    out = [header, bytes(-len(header) % g.alignment)]
    for tensor in g.tensors:
        out += [tensor.data, bytes(-len(tensor.data) % g.alignment)]
    return b"".join(out)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["beside the model", "on another file system"])
@pytest.mark.parametrize("alignment", [32, 64, 4096, 65536])
@pytest.mark.parametrize("jobs", [1, 3])
def test_shards_are_what_their_segments_say(jobs: int, alignment: int, elsewhere: bool, tmp_path: Path) -> None:
    folder = tmp_path
    if elsewhere:
        folder = Path("/dev/shm") / f"moeshard-{os.getpid()}"
        if not folder.parent.exists() or folder.parent.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("needs a file system in memory")
        folder.mkdir(exist_ok=True)
    source = model(alignment, tmp_path / "model.gguf")
    keep = np.zeros((2, N_EXPERT), dtype=bool)
    keep[0, [0, 3, 4]] = keep[1, [1, 2, 5]] = True
    lists = [_core.shard_segments(source, half)[0] for half in (keep, ~keep)]
    # Of the slabs, which blocks could be shared.
    slabs = [(at - offset) % 4096 == 0 for _, offset, size, _, at in lists[0].segments if size >= 1 << 18]
    assert len(slabs) >= 10 and any(slabs) == (alignment >= 4096)
    paths = [folder / f"{i}.gguf" for i in range(2)]
    try:
        _core.write_segments(lists, paths, jobs=jobs)
        for segments, path in zip(lists, paths, strict=True):
            assert path.read_bytes() == segments.read(0, segments.size)
            assert path.stat().st_blocks * 512 >= segments.size
    finally:
        if elsewhere:
            for path in paths:
                path.unlink(missing_ok=True)
            folder.rmdir()
