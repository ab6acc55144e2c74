"""Copies of a model's file that say other things about it."""

from __future__ import annotations

import struct
from pathlib import Path

from gguf_bytes import Gguf

import moeshard


def entry(key: str, kind: int, value: object) -> bytes:
    """One key of the metadata, encoded; a list of values becomes an array."""
    made = Gguf()
    return (made.array(key, kind, value) if isinstance(value, list) else made.kv(key, kind, value)).entries[0]


def with_entries(source: Path, out: Path, entries: list[bytes], at: int | None = None) -> Path:
    """Write `source` with these entries before its entry `at` (by default the end), instead of their namesakes."""
    file = moeshard.GGUFMap(source)
    (part,) = file.parts
    data = source.read_bytes()
    keys = {e[8 : 8 + struct.unpack_from("<Q", e)[0]].decode() for e in entries}
    own = [data[begin : begin + size] for key, (begin, size) in part.entry_ranges.items() if key not in keys]
    at = len(own) if at is None else at
    own[at:at] = entries
    begin = sum(part.metadata_range)
    size = sum(8 + len(info.name.encode()) + 4 + 8 * len(info.shape) + 4 + 8 for info in file.tensor_infos)
    header = data[:16] + struct.pack("<Q", len(own)) + b"".join(own) + data[begin : begin + size]
    out.write_bytes(header + bytes(-len(header) % part.alignment) + data[part.data_offset :])
    return out
