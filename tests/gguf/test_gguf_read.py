"""Good files are read as they were written."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import gguf
import gguf_bytes as gb
import numpy as np
import pytest
from gguf_bytes import Gguf

import moeshard

EMBEDDED = Path(moeshard.__file__).parent / "data" / "tinymoe.gguf"


@pytest.fixture
def write(tmp_path):
    def write(g: Gguf | bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(g if isinstance(g, bytes) else g.build())
        return path

    return write


SCALARS = [
    (gb.U8, 255),
    (gb.I8, -128),
    (gb.U16, 65535),
    (gb.I16, -32768),
    (gb.U32, 2**32 - 1),
    (gb.I32, -(2**31)),
    (gb.F32, 0.5),
    (gb.BOOL, True),
    (gb.STRING, "naïve 専門家"),
    (gb.U64, 2**64 - 1),
    (gb.I64, -(2**63)),
    (gb.F64, 1e300),
]
DTYPES = {gb.U8: "u1", gb.I8: "i1", gb.U16: "u2", gb.I16: "i2", gb.U32: "u4", gb.I32: "i4", gb.F32: "f4"}
DTYPES |= {gb.BOOL: "?", gb.U64: "u8", gb.I64: "i8", gb.F64: "f8"}


@pytest.mark.parametrize(("kind", "value"), SCALARS)
@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(write, kind, value, version):
    g = Gguf(version=version).kv("scalar", kind, value)
    g.array("several", kind, [value, value]).array("empty", kind, [])
    metadata = moeshard.GGUFMap(write(g)).metadata
    assert metadata["scalar"] == value
    assert type(metadata["scalar"]) is type(value)
    assert list(metadata["several"]) == [value, value]
    assert len(metadata["empty"]) == 0
    if kind != gb.STRING:
        assert metadata["several"].dtype == np.dtype(DTYPES[kind])


def test_a_bool_is_any_byte(write):
    g = Gguf().kv("scalar", gb.BOOL, True).array("several", gb.BOOL, [True, False])
    data = g.build().replace(b"\x01\x00" + bytes(-len(g.header()) % 32), b"\x07\x00" + bytes(-len(g.header()) % 32))
    metadata = moeshard.GGUFMap(write(data)).metadata
    assert metadata["several"].view(np.uint8).tolist() == [1, 0]


def test_metadata_is_a_mapping(write):
    metadata = moeshard.GGUFMap(write(Gguf().kv("a", gb.U8, 1).kv("b", gb.STRING, "x"))).metadata
    assert isinstance(metadata, Mapping)
    assert dict(metadata) == {"a": 1, "b": "x"} == dict(metadata.items())
    assert list(metadata) == list(metadata.keys()) == ["a", "b"]
    assert list(metadata.values()) == [1, "x"]
    assert len(metadata) == 2
    assert "a" in metadata
    assert "c" not in metadata
    assert 3 not in metadata
    assert metadata.get("c") is None
    assert metadata.get("c", 5) == 5
    with pytest.raises(KeyError, match="c"):
        metadata["c"]


def test_tokens_may_be_pieces_of_characters(write):
    tokens = moeshard.GGUFMap(write(Gguf().array("t", gb.STRING, ["é", b"\xc3", b"\x00"]))).metadata["t"]
    assert [t.encode(errors="surrogateescape") for t in tokens] == ["é".encode(), b"\xc3", b"\x00"]


def test_byte_ranges_of_metadata(write):
    g = Gguf().kv("a", gb.U8, 1).array("tokens", gb.STRING, ["x", "yz"]).array("none", gb.I32, []).tensor("t", (4,))
    data = g.build()
    part = moeshard.GGUFMap(write(data)).parts[0]
    offset, size = part.metadata_range
    assert data[offset : offset + size] == b"".join(g.entries)
    ranges = [data[at : at + n] for at, n in part.entry_ranges.values()]
    assert ranges == g.entries
    assert (part.version, part.alignment, part.size) == (3, 32, len(data))
    assert part.data_offset == len(g.header()) + -len(g.header()) % 32


def test_bytes_of_the_opened_file(write):
    path = write(Gguf().tensor("a", (4,)), "old.gguf")
    part, data = moeshard.GGUFMap(path).parts[0], path.read_bytes()
    write(Gguf().tensor("b", (8,)), "new.gguf").rename(path)
    assert part.read(0, len(data)) == data
    assert part.read(7, 5) == data[7:12]
    assert part.read(len(data), 0) == b""
    for offset, size in ((0, len(data) + 1), (len(data) + 1, 0), (5, 2**63), (2**63, 2**63)):
        with pytest.raises(moeshard.MoeshardError, match="past the end of the file"):
            part.read(offset, size)


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment(write, alignment):
    g = Gguf(alignment=alignment).kv("general.alignment", gb.U32, alignment)
    g.tensor("a", (3,), "f16").tensor("b", (5, 2)).tensor("c", (1,), "i64")
    tensors = moeshard.GGUFMap(write(g)).tensors
    for t in g.tensors:
        assert tensors[t.name.decode()].tobytes() == t.data


def test_shapes_and_types(write):
    g = Gguf().tensor("f32", (3, 2)).tensor("f16", (4, 3, 2), "f16").tensor("q8", (64, 3, 2), "q8_0")
    g.tensor("bf16", (6, 2), "bf16").tensor("i32", (5,), "i32").tensor("i64", (2, 1), "i64").tensor("point", ())
    g.tensor("nothing", (4, 0))
    m = moeshard.GGUFMap(write(g))
    views = {name: (view.dtype.name, view.shape) for name, view in m.tensors.items()}
    assert views == {
        "f32": ("float32", (2, 3)),
        "f16": ("float16", (2, 3, 4)),
        "q8": ("uint8", (2, 3, 68)),
        "bf16": ("uint8", (2, 12)),
        "i32": ("int32", (5,)),
        "i64": ("int64", (1, 2)),
        "point": ("float32", ()),
        "nothing": ("float32", (0, 4)),
    }
    for info, t in zip(m.tensor_infos, g.tensors, strict=True):
        assert info.name == t.name.decode()
        assert info.shape == t.ne[::-1]
        assert info.nbytes == len(t.data)
        assert m.tensors[info.name].tobytes() == t.data
    assert [info.type for info in m.tensor_infos][:4] == ["f32", "f16", "q8_0", "bf16"]


def test_the_last_tensor_needs_no_padding_and_gaps_are_allowed(write):
    g = Gguf(padding=False).tensor("a", (4,)).tensor("b", (3,), offset=128)
    tensors = moeshard.GGUFMap(write(g)).tensors
    assert tensors["b"].tobytes() == g.tensors[1].data


def test_a_file_without_tensors_may_end_after_its_metadata(write):
    assert len(moeshard.GGUFMap(write(Gguf().kv("a", gb.U8, 1).header())).tensors) == 0


def test_views_are_read_only_and_outlive_the_map(write):
    g = Gguf().tensor("a", (256, 64))
    m = moeshard.GGUFMap(write(g))
    view = m.tensors["a"][3:5]
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        m.tensors["a"].setflags(write=True)
    tensors, metadata, part, info = m.tensors, m.metadata, m.parts[0], m.tensor_infos[0]
    del m
    gc.collect()
    assert view.tobytes() == g.tensors[0].data[3 * 1024 : 5 * 1024]
    del view
    gc.collect()
    assert tensors["a"].tobytes() == g.tensors[0].data
    assert len(metadata) == 0
    assert part.size > 0
    assert info.name == "a"


def test_views_are_not_copies(write):
    path = write(Gguf().tensor("a", (1024, 16)))
    view = moeshard.GGUFMap(path).tensors["a"]
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 4)
        file.write(np.float32(7.5).tobytes())
    assert view[-1, -1] == 7.5


def test_mappings_are_released(write):
    path = write(Gguf().tensor("a", (64,)))

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    for _ in range(100):
        view = moeshard.GGUFMap(path).tensors["a"]
    assert mapped() == 1
    del view
    assert mapped() == 0


def test_paths_of_any_kind(write):
    path = write(Gguf().kv("a", gb.U8, 1), "größe.gguf")
    assert moeshard.GGUFMap(path).path == moeshard.GGUFMap(str(path)).path == str(path)


def written_by_gguf_py(path: Path) -> Path:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("some.ints", [1, 2, 3])
    writer.add_array("some.strings", ["a", "b"])
    for i, kind in enumerate(["Q4_0", "Q8_0", "BF16", "F16", "F32"]):
        data = rng.standard_normal((3, 2, 64)).astype(np.float32)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"t{i}", gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("source", ["embedded", "written"])
def test_like_the_gguf_package(source, tmp_path):
    path = EMBEDDED if source == "embedded" else written_by_gguf_py(tmp_path / "w.gguf")
    ours, theirs = moeshard.GGUFMap(path), gguf.GGUFReader(path)
    fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        value = ours.metadata[key]
        value = value.tolist() if isinstance(value, np.ndarray) else value
        assert value == field.contents(), key
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for info, tensor in zip(ours.tensor_infos, theirs.tensors, strict=True):
        assert (info.nbytes, info.offset) == (tensor.n_bytes, tensor.data_offset)
        assert info.type.upper() == tensor.tensor_type.name
        assert info.shape == tuple(int(n) for n in tensor.shape[::-1])
        view = ours.tensors[info.name]
        assert view.shape == tensor.data.shape
        assert view.tobytes() == tensor.data.tobytes()
