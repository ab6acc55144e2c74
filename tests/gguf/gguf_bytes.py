"""GGUF files written section by section, so that a test can spoil exactly one of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
# ggml types: number, elements of a block, bytes of a block
TYPES = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "q8_0": (8, 32, 34),
    "i32": (26, 1, 4),
    "i64": (27, 1, 8),
    "bf16": (30, 1, 2),
}


@dataclass
class Tensor:
    name: bytes
    ne: tuple[int, ...]  # ggml's order
    type: int
    data: bytes
    offset: int | None = None  # None: after the one before


@dataclass
class Gguf:
    """Everything a good file needs; what is None is computed."""

    magic: bytes = b"GGUF"
    version: int = 3
    order: str = "<"
    alignment: int = 32  # of the layout; the key is written only by kv()
    n_entries: int | None = None
    n_tensors: int | None = None
    entries: list[bytes] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    padding: bool = True  # after the last tensor

    def pack(self, form: str, *values: object) -> bytes:
        return struct.pack(self.order + form, *values)

    def string(self, text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return self.pack("Q", len(raw)) + raw

    def value(self, kind: int, value: object) -> bytes:
        return self.string(value) if kind == STRING else self.pack(FORMATS[kind], value)

    def kv(self, key: str | bytes, kind: int, value: object) -> Gguf:
        self.entries.append(self.string(key) + self.pack("I", kind) + self.value(kind, value))
        return self

    def array(self, key: str, kind: int, values: list[object], count: int | None = None) -> Gguf:
        head = self.string(key) + self.pack("IIQ", ARRAY, kind, len(values) if count is None else count)
        self.entries.append(head + b"".join(self.value(kind, v) for v in values))
        return self

    def tensor(self, name: str | bytes, ne: tuple[int, ...], kind: str = "f32", offset: int | None = None) -> Gguf:
        number, block, size = TYPES[kind]
        n_bytes = size
        for i, n in enumerate(ne):
            n_bytes *= n // block if i == 0 else n
        # Bytes that tell tensors apart and are numbers in every type.
        data = bytes((len(self.tensors) * 7 + i) % 100 for i in range(n_bytes))
        self.tensors.append(Tensor(name.encode() if isinstance(name, str) else name, ne, number, data, offset))
        return self

    def offsets(self) -> list[int]:
        offsets, end = [], 0
        for t in self.tensors:
            offsets.append(end if t.offset is None else t.offset)
            end = offsets[-1] + len(t.data)
            end += -end % self.alignment
        return offsets

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_entries = len(self.entries) if self.n_entries is None else self.n_entries
        out = self.magic + self.pack("IQQ", self.version, n_tensors, n_entries) + b"".join(self.entries)
        for t, offset in zip(self.tensors, self.offsets(), strict=True):
            out += self.string(t.name) + self.pack("I", len(t.ne)) + self.pack(f"{len(t.ne)}Q", *t.ne)
            out += self.pack("IQ", t.type, offset)
        return out

    def build(self) -> bytes:
        out = bytearray(self.header())
        out += bytes(-len(out) % self.alignment)
        start = len(out)
        for t, offset in zip(self.tensors, self.offsets(), strict=True):
            at = start + offset
            if at > 1 << 20:
                continue  # an offset that is spoilt on purpose
            out += bytes(max(0, at - len(out)))
            out[at : at + len(t.data)] = t.data
        if self.padding:
            out += bytes(-len(out) % self.alignment)
        return bytes(out)


def model(arch: str = "qwen3moe", n_layer: int = 2, n_expert: int = 4, used: int = 2, n_embd: int = 32) -> Gguf:
    """A file with the metadata of a MoE model and no tensors yet."""
    g = Gguf().kv("general.architecture", STRING, arch)
    g.kv(f"{arch}.block_count", U32, n_layer).kv(f"{arch}.embedding_length", U32, n_embd)
    if n_expert:
        g.kv(f"{arch}.expert_count", U32, n_expert).kv(f"{arch}.expert_used_count", U32, used)
    return g


def moe_tensors(g: Gguf, layers: range, n_expert: int = 4, n_embd: int = 32, n_ff: int = 64, kind: str = "f32") -> Gguf:
    for i in layers:
        g.tensor(f"blk.{i}.ffn_gate_inp.weight", (n_embd, n_expert))
        g.tensor(f"blk.{i}.ffn_gate_exps.weight", (n_embd, n_ff, n_expert), kind)
        g.tensor(f"blk.{i}.ffn_up_exps.weight", (n_embd, n_ff, n_expert), kind)
        g.tensor(f"blk.{i}.ffn_down_exps.weight", (n_ff, n_embd, n_expert), kind)
    return g
