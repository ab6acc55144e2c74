"""Bytes of a shard however they are copied: in pieces, by the kernel, to another file system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from fault_scripts import run, sizeable_model
from shard_files import gb
from shims import COPY_FAILS, HOLES_LIE, Shim

import moeshard
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


# File systems that behave oddly


SPLIT = """
model, out = sys.argv[1:]
attempt(moeshard.split, model, "0,3-4", out, jobs=1)
"""


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("name", ["EIO", "EBADF", "ENOTTY", "EACCES", "EOPNOTSUPP", "EXDEV", "EINVAL", "EPERM", ""])
def test_kernel_that_cannot_copy(name: str, after: int, tmp_path: Path) -> None:
    """Whatever it says, or if it copies nothing: the bytes are read and written, and nobody is blamed."""
    shim = Shim(tmp_path, COPY_FAILS)
    source = model(4096, tmp_path / "model.gguf")
    keep = np.zeros((2, N_EXPERT), dtype=bool)
    keep[:, [0, 3, 4]] = True
    number = getattr(errno, name) if name else 0
    lines = run(SPLIT, source.path, tmp_path / "out.gguf", within=shim(SHIM_ERRNO=number, SHIM_AFTER=after))
    assert lines == ["done"] and shim.was_met
    moeshard.verify(tmp_path / "out.gguf", source)


def test_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """What is wrong with the source shows when it is read."""
    shim = Shim(
        tmp_path,
        COPY_FAILS
        + """
ssize_t pread(int fd, void *out, size_t size, off_t offset) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    if (offset > (1 << 20) && is_model(fd)) { errno = EIO; return -1; }
    return real(fd, out, size, offset);
}
""",
    )
    source = model(4096, tmp_path / "model.gguf")
    within = shim(SHIM_ERRNO=errno.EIO, SHIM_AFTER=0)
    script = """
model, out = sys.argv[1:]
file = GGUFMap(model)
(segments,) = _core.shard_segments(file, moeshard.parse_keep("3-5", 2, 6))
attempt(_core.write_segments, [segments], [out], jobs=1)
print(os.path.exists(out))
"""
    lines = run(script, source.path, tmp_path / "out.gguf", within=within)
    assert lines == [f"refused: {source.path}: cannot read: Input/output error", "False"]


def punch(path: Path) -> None:
    """Append a hole, so that the file counts as sparse."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 20))


def test_data_that_is_called_a_hole(tmp_path: Path) -> None:
    shim = Shim(tmp_path, HOLES_LIE)
    path = Path(model(4096, tmp_path / "model.gguf").path)
    punch(path)
    assert path.stat().st_blocks * 512 < path.stat().st_size
    lines = run(SPLIT, path, tmp_path / "out.gguf", within=shim())
    assert lines == ["done"] and shim.was_met
    moeshard.verify(tmp_path / "out.gguf", path)


def test_difference_that_is_called_a_hole(tmp_path: Path) -> None:
    """Comparing believes no holes either."""
    shim = Shim(tmp_path, HOLES_LIE)
    path = Path(model(4096, tmp_path / "model.gguf").path)
    punch(path)
    (segments,) = _core.shard_segments(GGUFMap(path), moeshard.parse_keep("0,3-4", 2, N_EXPERT))
    _core.write_segments([segments], [tmp_path / "out.gguf"])
    punch(tmp_path / "out.gguf")
    script = """
model, out = sys.argv[1:]
(segments,) = _core.shard_segments(GGUFMap(model), moeshard.parse_keep("0,3-4", 2, 6))
print(_core.first_difference(segments, out))
with open(out, "r+b") as file:
    file.seek(segments.size - 100)
    file.write(b"?")
print(_core.first_difference(segments, out))
print(segments.size)
"""
    same, differs, size = run(script, path, tmp_path / "out.gguf", within=shim())
    assert same != "None" and int(differs) == int(size) - 100


def test_holes_stay_holes(tmp_path: Path) -> None:
    path = sizeable_model(tmp_path / "model.gguf", 64 << 20, hole=True)
    moeshard.split(path, "0-31", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").stat().st_blocks * 512 < 2 << 20
    moeshard.verify(tmp_path / "out.gguf", path)
