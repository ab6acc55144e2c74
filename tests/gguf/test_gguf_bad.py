"""Bad files, each beside the good twin it was made from: a named error, never a crash and never a view."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import gguf_bytes as gb
import pytest
from gguf_bytes import Gguf

import moeshard


def good() -> Gguf:
    g = Gguf().kv("general.architecture", gb.STRING, "llama").kv("general.alignment", gb.U32, 32)
    g.array("tokens", gb.STRING, ["a", "bc"]).array("scores", gb.F32, [0.0, 1.0]).array("none", gb.U8, [])
    return g.tensor("first", (8, 3)).tensor("second", (32, 2), "q8_0").tensor("third", (5,), "f16")


def spoil(change: Callable[[Gguf], object]) -> bytes:
    g = good()
    change(g)
    return g.build()


def replaced(old: bytes, new: bytes) -> Callable[[], bytes]:
    def make() -> bytes:
        data = good().build()
        assert data.count(old) == 1
        return data.replace(old, new)

    return make


def attribute(**values: object) -> Callable[[], bytes]:
    return lambda: spoil(lambda g: [setattr(g, k, v) for k, v in values.items()])


def of_tensor(index: int, **values: object) -> Callable[[], bytes]:
    return lambda: spoil(lambda g: [setattr(g.tensors[index], k, v) for k, v in values.items()])


def kv(*args: object) -> Callable[[], bytes]:
    return lambda: spoil(lambda g: g.kv(*args))


def raw_entry(entry: bytes) -> Callable[[], bytes]:
    return lambda: spoil(lambda g: g.entries.append(entry))


def alignment(value: object, kind: int = gb.U32) -> Callable[[], bytes]:
    def change(g: Gguf) -> None:
        g.entries[1:2] = []
        g.kv("general.alignment", kind, value)

    return lambda: spoil(change)


S = Gguf().string
NAMED = S("name")
BAD = {
    "empty": (lambda: b"", "is empty"),
    "magic": (attribute(magic=b"GGML"), "not a GGUF file.*'GGML'"),
    "magic unprintable": (attribute(magic=b"\x7fELF"), r"not a GGUF file.*'\\x7fELF'"),
    "version 0": (attribute(version=0), "version 0 is not supported"),
    "version 1": (attribute(version=1), "version 1 is not supported"),
    "version 4": (attribute(version=4), "version 4 is not supported"),
    "other byte order": (lambda: spoil(lambda g: setattr(g, "order", ">")), "other byte order"),
    "too many keys": (attribute(n_entries=2**40), "claims 1099511627776 keys"),
    "negative keys": (attribute(n_entries=2**64 - 1), "keys, more than fit"),
    "too many tensors": (attribute(n_tensors=2**40), "claims 1099511627776 tensors"),
    "one tensor too many": (attribute(n_tensors=4), "tensor 3"),
    "one key too many": (attribute(n_entries=6), "tensor|key|type|ends"),
    "empty key": (kv("", gb.U8, 1), "key 5 is empty"),
    "key not UTF-8": (kv(b"a\xff", gb.U8, 1), r"key 5 is not valid UTF-8 \('a\\xff'\)"),
    "key with zero": (kv(b"a\0b", gb.U8, 1), r"key 5 contains a zero byte"),
    "key twice": (kv("scores", gb.U8, 1), "key 'scores' appears twice"),
    "overlong UTF-8": (kv(b"k\xc0\x80", gb.U8, 1), "not valid UTF-8"),
    "surrogate": (kv(b"k\xed\xa0\x80", gb.U8, 1), "not valid UTF-8"),
    "beyond Unicode": (kv(b"k\xf4\x90\x80\x80", gb.U8, 1), "not valid UTF-8"),
    "cut UTF-8": (kv(b"k\xe2\x82", gb.U8, 1), "not valid UTF-8"),
    "unknown value type": (raw_entry(NAMED + b"\x0d\0\0\0" + bytes(8)), "key 'name' has unknown .* type 13"),
    "array of arrays": (raw_entry(NAMED + b"\x09\0\0\0\x09\0\0\0" + bytes(8)), "'name' has elements of .* type 9"),
    "array too long": (lambda: spoil(lambda g: g.array("name", gb.U64, [1], 2**61 + 1)), "'name' claims 23058"),
    "strings too long": (lambda: spoil(lambda g: g.array("name", gb.STRING, [], 2**62)), "'name' claims 46116"),
    "string too long": (raw_entry(NAMED + b"\x08\0\0\0" + b"\xff" * 8), "ends inside the value of key 'name'"),
    "string past the end": (raw_entry(NAMED + b"\x08\0\0\0" + b"\0\x10" + bytes(6)), "ends inside the value of key"),
    "alignment 0": (alignment(0), "alignment is 0, which is no power of two"),
    "alignment 24": (alignment(24), "alignment is 24, which is no power of two"),
    "alignment of another type": (alignment(32, gb.U64), "alignment must be a uint32"),
    "alignment beyond the file": (alignment(2**31), "ends before its data section"),
    "no tensor name": (of_tensor(1, name=b""), "name of tensor 1 is empty"),
    "tensor name too long": (of_tensor(1, name=b"n" * 64), "longer than the 63 bytes"),
    "tensor name not UTF-8": (of_tensor(1, name=b"n\x80"), "name of tensor 1 is not valid UTF-8"),
    "tensor name with zero": (of_tensor(1, name=b"n\0m"), "name of tensor 1 contains a zero byte"),
    "tensor twice": (of_tensor(1, name=b"first"), "tensor 'first' appears twice"),
    "five dimensions": (of_tensor(0, ne=(1, 1, 1, 1, 1)), "tensor 'first' has 5 dimensions"),
    "negative size": (of_tensor(0, ne=(2**64 - 1, 1)), r"'first' \[18446744073709551615, 1\].*larger than any file"),
    "size overflows": (of_tensor(0, ne=(2**32, 2**32)), "'first'.*larger than any file"),
    "size overflows to little": (of_tensor(0, ne=(2**63, 4)), "'first'.*larger than any file"),
    "bytes overflow": (of_tensor(0, ne=(2**62,)), "'first'.*larger than any file"),
    "unknown tensor type": (of_tensor(0, type=99), "'first'.*ggml type 99"),
    "no tensor type": (of_tensor(0, type=2**32 - 1), "'first'.*ggml type 4294967295"),
    "removed tensor type": (of_tensor(0, type=31), "'first'.*ggml type 31.*no longer supports"),
    "half a block": (of_tensor(1, ne=(16, 4)), "'second'.*rows of 16 elements.*32 elements of a block of q8_0"),
    "unaligned": (of_tensor(1, offset=97), "'second' lies at offset 97, which is not aligned to 32"),
    "past the end": (of_tensor(2, ne=(512,)), "'third' .*reaches past the end of the file"),
    "offset past the end": (of_tensor(2, offset=2**40), "'third' .*reaches past the end of the file"),
    "offset overflows": (of_tensor(2, offset=2**64 - 32), "'third' .*reaches past the end of the file"),
    "same data": (of_tensor(1, offset=0), "'first' and 'second' overlap|'second' and 'first' overlap"),
    "overlap": (of_tensor(1, offset=64), "'first' and 'second' overlap"),
    "hidden overlap": (of_tensor(2, offset=32), "'first' and 'third' overlap"),
}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.gguf"


def test_the_good_twin(path):
    path.write_bytes(good().build())
    assert list(moeshard.GGUFMap(path).tensors) == ["first", "second", "third"]


@pytest.mark.parametrize("case", BAD)
def test_bad(case, path):
    make, message = BAD[case]
    path.write_bytes(make())
    with pytest.raises(moeshard.MoeshardError, match=message) as caught:
        moeshard.GGUFMap(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("version", [2, 3])
def test_truncated_anywhere(version, path):
    g = good()
    g.version = version
    g.padding = False
    data = g.build()
    path.write_bytes(data)
    moeshard.GGUFMap(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(moeshard.MoeshardError, match="ends|end of|empty|more than fit|are left"):
            moeshard.GGUFMap(path)


def test_random_damage_is_an_error_or_a_file(path):
    """Whatever the parser lets pass can be looked at in full."""
    rng = random.Random(0)
    data = good().build()
    header = len(good().header())
    accepted = 0
    for _ in range(1000):
        spoilt = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(4, header)
            spoilt[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256), spoilt[at] ^ 1 << rng.randrange(8)])
        path.write_bytes(spoilt)
        try:
            m = moeshard.GGUFMap(path)
        except moeshard.MoeshardError as error:
            assert str(error).startswith(str(path))
            continue
        accepted += 1
        assert len(m.metadata.items()) == len(m.parts[0].entry_ranges)
        for view in m.tensors.values():
            view.tobytes()
    assert accepted > 25


def test_what_is_no_file(tmp_path):
    with pytest.raises(moeshard.MoeshardError, match="cannot open: No such file"):
        moeshard.GGUFMap(tmp_path / "missing.gguf")
    with pytest.raises(moeshard.MoeshardError, match="is not a regular file"):
        moeshard.GGUFMap(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(moeshard.MoeshardError, match="is not a regular file"):
        moeshard.GGUFMap(tmp_path / "pipe.gguf")
