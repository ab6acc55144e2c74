"""Files where maps are refused, and processes that have little address space."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import gguf_bytes as gb
import numpy as np
import pytest
from shims import NO_MAPS, Shim

import moeshard

sys.path.insert(0, str(Path(__file__).parents[1] / "split"))

from fault_scripts import run, sizeable_model

LOOK = """
import hashlib
from moeshard.gguf.inspection import inspect_model
import numpy as np
model, out = sys.argv[1:]
file = GGUFMap(model)
print(hashlib.sha256(b"".join(file.tensors[name].tobytes() for name in file.tensors)).hexdigest())
print(hashlib.sha256(file.expert(1, "ffn_up_exps", 5).tobytes()).hexdigest())
print(inspect_model(model).n_expert)
for mmap in (True, False):
    loaded = moeshard.Model(model, n_ctx=64, n_threads=1, mmap=mmap)
    print(hashlib.sha256(loaded.logits(np.arange(10)).tobytes()).hexdigest())
print(hashlib.sha256(moeshard.Model(model, keep="0-63", n_ctx=64, n_threads=1).logits(np.arange(10))).hexdigest())
attempt(moeshard.split, model, "0-63", out, force=True)
attempt(moeshard.verify, out, model)
"""


@pytest.mark.parametrize("settings", [{}, {"SHIM_ALL": 1}], ids=["no shared maps", "no maps"])
def test_mounts_without_maps(settings: dict[str, object], tinymoe: Path, tmp_path: Path) -> None:
    shim = Shim(tmp_path, NO_MAPS)
    want = run(LOOK, tinymoe, tmp_path / "out.gguf")
    found = run(LOOK, tinymoe, tmp_path / "out.gguf", within=shim(**settings))
    assert found == want and found[-2:] == ["done", "done"]
    assert shim.was_met


def test_views_without_maps_outlive_the_file(tinymoe: Path, tmp_path: Path) -> None:
    script = """
import gc
file = GGUFMap(sys.argv[1])
view = file.expert(1, "ffn_up_exps", 5)
want = bytes(file.parts[0].read(file.tensor_infos[0].offset, 8))
first = file.tensors[file.tensor_infos[0].name]
before = view.tobytes()
del file
gc.collect()
print(view.tobytes() == before, first.tobytes()[:8] == want, view.flags.writeable)
"""
    shim = Shim(tmp_path, NO_MAPS)
    assert run(script, tinymoe, within=shim(SHIM_ALL=1)) == ["True True False"]


@pytest.mark.skipif("MOESHARD_TEST_CORE" in os.environ, reason="a sanitizer takes terabytes of address space")
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space the way Linux does")
def test_little_address_space(tmp_path: Path) -> None:
    """Reading a header takes none for the weights, and of them only what is looked at."""
    path = sizeable_model(tmp_path / "large.gguf", 16 << 30, hole=True)
    script = """
import numpy as np
from moeshard.gguf.inspection import inspect_model
path, out = sys.argv[1:]
inspect_model(moeshard.embedded_model())  # everything is imported
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(inspect_model(path).n_expert)
file = GGUFMap(path)
print(file.expert(0, "ffn_up_exps", 5).nbytes, file.tensors["token_embd.weight"].nbytes)
attempt(lambda: file.tensors["blk.0.ffn_up_exps.weight"])
attempt(lambda: file.parts[0].read(0, 8 << 30))
attempt(moeshard.split, path, "0-1", out, jobs=1)
"""
    lines = run(script, path, tmp_path / "out.gguf")
    assert lines[0] == "64"
    assert lines[1] == f"{(16 << 30) // 64} {5 * 32 * 4}"
    assert lines[2:] == ["refused: out of memory", "refused: out of memory", "done"]


def test_headers_of_any_length(tmp_path: Path) -> None:
    """They are read in steps; wherever one ends, it is read whole."""
    for n_bytes in (1, (1 << 20) - 200, 1 << 20, (1 << 22) + 1, 5 << 20):
        text = "x" * n_bytes
        g = gb.Gguf().kv("before", gb.U8, 1).kv("long", gb.STRING, text).array("short", gb.STRING, ["a"] * 100)
        path = tmp_path / "long.gguf"
        header = g.tensor("one", (4, 3)).tensor("two", (4, 3)).header()
        padded = [data + bytes(-len(data) % 32) for data in (header, *(tensor.data for tensor in g.tensors))]
        path.write_bytes(b"".join(padded))
        file = moeshard.GGUFMap(path)
        assert file.metadata["long"] == text and file.metadata["short"] == ["a"] * 100
        np.testing.assert_array_equal(file.tensors["two"], np.frombuffer(g.tensors[1].data, "f4").reshape(3, 4))


def test_header_that_would_take_all_memory(tmp_path: Path) -> None:
    """A number that was damaged does not have gigabytes read into memory."""
    g = gb.Gguf().kv("long", gb.STRING, "")
    path = tmp_path / "damaged.gguf"
    data = bytearray(g.build())
    data[24 + 8 + 4 + 4 : 24 + 8 + 4 + 12] = (8 << 30).to_bytes(8, "little")
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(16 << 30)
    with pytest.raises(moeshard.MoeshardError, match=r"damaged.gguf: its header would be longer than 1 GiB; it is dam"):
        moeshard.GGUFMap(path)
