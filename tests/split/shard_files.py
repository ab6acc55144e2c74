"""Small models written for these tests, and what is known about them without moeshard's help."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st

from moeshard import MoeshardError

sys.path.insert(0, str(Path(__file__).parents[1] / "gguf"))

import gguf_bytes as gb
from gguf_bytes import Gguf

__all__ = [
    "Gguf",
    "Keep",
    "Source",
    "add",
    "add_experts",
    "add_table",
    "gb",
    "keep_of",
    "new_source",
    "partitions",
    "refused",
    "small_source",
    "sources",
    "typical_difference",
]

Keep = npt.NDArray[np.bool_]

# Every type that the gguf package knows, with the sizes that it gives; gguf_bytes writes tensors of types in its table.
gb.TYPES.update({kind.name.lower(): (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType})
SLAB_TYPES = sorted(set(gb.TYPES) - {"i8", "i16", "i32", "i64", "f64", "q8_1", "q8_k"})


@dataclass
class Source:
    """A model: its file, and which tensors depend on experts."""

    gguf: Gguf
    arch: str
    n_layer: int
    n_expert: int
    used: list[int]  # per layer; 0 in dense layers
    n_group: int = 1
    layer_of: dict[str, int] = field(default_factory=dict)  # of tensors whose outermost axis counts experts
    tables: dict[str, int] = field(default_factory=dict)  # of tensors that hold expert ids

    @property
    def expert_layers(self) -> list[int]:
        return [layer for layer, used in enumerate(self.used) if used]

    def data(self, name: str) -> bytes:
        return next(tensor.data for tensor in self.gguf.tensors if tensor.name.decode() == name)

    def expected(self, name: str, keep: Keep, n_used: int | None = None) -> bytes:
        """What a tensor holds in the shard of `keep`; `n_used`: fewer experts per token than the model uses."""
        data = self.data(name)
        if name in self.layer_of:
            n_bytes = len(data) // self.n_expert
            slices = [data[i * n_bytes : (i + 1) * n_bytes] for i in range(self.n_expert)]
            return b"".join(slices[expert] for expert in np.flatnonzero(keep[self.layer_of[name]]))
        if name in self.tables:
            row = keep[self.tables[name]]
            number = np.cumsum(row) - 1
            table = np.frombuffer(data, np.int32).reshape(-1, self.used[self.tables[name]])[:, :n_used]
            return b"".join(number[replaced(ids, row)].astype(np.int32).tobytes() for ids in table.tolist())
        return data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.gguf.build())
        return path

    def write_parts(self, folder: Path, n_parts: int, version: int | None = None) -> Path:
        """Write it as several files; return the first. All of them name the version."""
        tensors = self.gguf.tensors
        bounds = [round(i * len(tensors) / n_parts) for i in range(n_parts + 1)]
        paths = [folder / f"model-{i + 1:05}-of-{n_parts:05}.gguf" for i in range(n_parts)]
        for i, path in enumerate(paths):
            part = replace(self.gguf, entries=list(self.gguf.entries) if i == 0 else [])
            part.tensors = tensors[bounds[i] : bounds[i + 1]]
            if version is not None:
                part.kv("general.version", gb.U32, version)
            part.kv("split.no", gb.U16, i).kv("split.count", gb.U16, n_parts)
            part.kv("split.tensors.count", gb.I32, len(tensors))
            if i > 0 and part.alignment != 32:
                part.kv("general.alignment", gb.U32, part.alignment)
            path.write_bytes(part.build())
        return paths[0]


def replaced(ids: list[int], keep: npt.NDArray[np.bool_]) -> list[int]:
    """The rule as docs/masking.md states it: a dropped id becomes the next kept one that the token does not use."""
    out = list(ids)
    for i, expert in enumerate(ids):
        if not keep[expert]:
            candidates = [(expert + step) % len(keep) for step in range(1, len(keep))]
            out[i] = next(c for c in candidates if keep[c] and c not in out)
    return out


def add(source: Source, rng: np.random.Generator, name: str, ne: tuple[int, ...], kind: str = "f32") -> None:
    """Add a tensor of random bytes, so that no slice of it is like another."""
    source.gguf.tensor(name, ne, kind)
    tensor = source.gguf.tensors[-1]
    tensor.data = rng.bytes(len(tensor.data))


def add_experts(source: Source, rng: np.random.Generator, layer: int, kind: str, extras: bool) -> None:
    """Add what depends on experts in a layer: everything that may with `extras`, else what always does."""
    block = gb.TYPES[kind][1]
    n_embd, n_ff, n = 32, max(block, 32), source.n_expert
    shapes: list[tuple[str, tuple[int, ...], str]] = [
        ("ffn_gate_inp.weight", (n_embd, n), "f32"),
        ("ffn_up_exps.weight", (n_ff, 3, n), kind),
        ("ffn_down_exps.weight", (n_ff, 2, n), kind),
    ]
    if extras:
        shapes += [
            ("ffn_gate_inp.bias", (n,), "f32"),
            ("exp_probs_b.bias", (n,), "f32"),
            ("ffn_up_exps.bias", (n_ff, n), "f32"),
            ("ffn_down_exps.scale", (n,), "f32"),
            ("ffn_gate_up_exps.weight", (n_embd, 5, n), "f16"),
        ]
    for stem, ne, of in shapes:
        name = f"blk.{layer}.{stem}"
        add(source, rng, name, ne, of)
        source.layer_of[name] = layer


def new_source(arch: str, n_layer: int, n_expert: int, used: list[int], alignment: int, version: int) -> Source:
    g = Gguf(version=version, alignment=alignment).kv("general.architecture", gb.STRING, arch)
    if alignment != 32:
        g.kv("general.alignment", gb.U32, alignment)
    # What gguf.GGUFWriter cannot write.
    g.array("tokenizer.ggml.tokens", gb.STRING, ["a", b"\xc3", "é", ""]).array("tokenizer.ggml.merges", gb.STRING, [])
    g.kv(f"{arch}.block_count", gb.U32, n_layer).kv(f"{arch}.embedding_length", gb.U32, 32)
    g.kv(f"{arch}.expert_count", gb.U32, n_expert)
    counts = {count for count in used if count}
    if len(counts) > 1 or arch == "nemotron_h_moe":
        g.array(f"{arch}.expert_used_count", gb.I32, list(used))
    else:
        g.kv(f"{arch}.expert_used_count", gb.U16, counts.pop())
    g.array(f"{arch}.some.empty", gb.I32, []).kv("general.name", gb.STRING, "largest of all")
    return Source(g, arch, n_layer, n_expert, used)


@st.composite
def sources(draw: st.DrawFn) -> Source:
    arch = draw(st.sampled_from(["qwen3moe", "glm4moe", "deepseek2", "nemotron_h_moe", "deepseek4"]))
    n_layer = draw(st.integers(1, 3))
    n_group = draw(st.sampled_from([1, 1, 4])) if arch == "deepseek2" else 1
    n_expert = draw(st.sampled_from([16, 24] if n_group > 1 else [4, 6, 16]))
    top = draw(st.integers(1, 2))
    used = [draw(st.sampled_from([0, top])) for _ in range(n_layer - 1)] + [top]
    if arch == "nemotron_h_moe":
        used = [count and draw(st.integers(1, 2)) for count in used]
    alignment = draw(st.sampled_from([32, 32, 64, 4096]))
    source = new_source(arch, n_layer, n_expert, used, alignment, draw(st.sampled_from([2, 3])))
    source.n_group = n_group
    if arch == "deepseek4":
        source.gguf.kv("deepseek4.expert_gating_func", gb.U32, 4)
    if n_group > 1:
        source.gguf.kv(f"{arch}.expert_group_count", gb.U32, n_group).kv(f"{arch}.expert_group_used_count", gb.U32, 2)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    add(source, rng, "token_embd.weight", (32, 5), "q8_0")
    for layer in range(n_layer):
        add(source, rng, f"blk.{layer}.attn_norm.weight", (n_expert,))  # the number of experts by coincidence
        if used[layer]:
            add_experts(source, rng, layer, draw(st.sampled_from(SLAB_TYPES)), draw(st.booleans()))
            add(source, rng, f"blk.{layer}.ffn_up_shexp.weight", (32, 3), "f16")
            if arch == "deepseek4" and draw(st.booleans()):
                add_table(source, rng, layer, draw(st.integers(1, 9)))
        else:
            add(source, rng, f"blk.{layer}.ffn_up.weight", (32, 3), "bf16")
    add(source, rng, "output.weight", (32, 5), "f16")
    return source


def add_table(source: Source, rng: np.random.Generator, layer: int, n_tokens: int) -> None:
    """Add the table of a hash-routed layer."""
    name = f"blk.{layer}.ffn_gate_tid2eid.weight"
    ids = [rng.permutation(source.n_expert)[: source.used[layer]] for _ in range(n_tokens)]
    source.gguf.tensor(name, (source.used[layer], n_tokens), "i32")
    source.gguf.tensors[-1].data = np.array(ids, dtype=np.int32).tobytes()
    source.tables[name] = layer


@st.composite
def partitions(draw: st.DrawFn, source: Source) -> list[Keep]:
    """Draw up to five keeps that together hold every expert, each as many in all layers and all expert groups."""
    size = source.n_expert // source.n_group
    # A group is scored by its best two experts, and two groups are searched.
    least = 2 if source.n_group > 1 else max(source.used)
    n_shards = draw(st.integers(1, min(5, size // least)))
    spare = size - n_shards * least
    cuts = sorted(draw(st.lists(st.integers(0, spare), min_size=n_shards - 1, max_size=n_shards - 1)))
    sizes = np.diff([0, *cuts, spare]) + least
    overlap = draw(st.integers(0, size - int(max(sizes))))  # experts that are in more than one
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    keeps = [np.zeros((source.n_layer, source.n_expert), dtype=bool) for _ in range(n_shards)]
    for layer in range(source.n_layer):
        for group in range(source.n_group):
            order = group * size + rng.permutation(size)
            ends = np.cumsum(sizes)
            for keep, begin, end in zip(keeps, ends - sizes, ends, strict=True):
                keep[layer, np.take(order, range(begin, end + overlap), mode="wrap")] = True
    return keeps


def small_source(n_layer: int = 2, n_expert: int = 8, used: int = 2, seed: int = 0, kind: str = "f32") -> Source:
    """A model that nothing is special about."""
    source = new_source("qwen3moe", n_layer, n_expert, [used] * n_layer, 32, 3)
    rng = np.random.default_rng(seed)
    add(source, rng, "token_embd.weight", (32, 5))
    for layer in range(n_layer):
        add_experts(source, rng, layer, kind, extras=False)
    return source


def keep_of(source: Source, *experts: int) -> Keep:
    """These experts in all layers."""
    keep = np.zeros((source.n_layer, source.n_expert), dtype=bool)
    keep[:, list(experts)] = True
    return keep


@contextmanager
def refused(folder: Path, message: str) -> Iterator[None]:
    """The block raises, and leaves the folder as it was."""

    def files() -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}

    before = files()
    with pytest.raises(MoeshardError, match=message):
        yield
    assert files() == before


def typical_difference(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    """Return how far apart logits (n_tokens, n_vocab) of half of the tokens are at most, of the largest.

    Not of all: where rounding tips a near-tie of a router, another expert computes, and that depends on the processor.
    """
    return float(np.median(np.abs(ours - theirs).max(axis=1)) / np.abs(theirs).max())
