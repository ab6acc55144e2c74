"""Copies of the embedded model with other metadata (templates, names, control tokens, another tokenizer) or weights."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moeshard import GGUFMap

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ALIGNMENT = 32
Values = np.ndarray[Any, Any]


def copy_with(source: Path, target: Path, changes: Mapping[str, Any]) -> Path:
    """Write a GGUF with the tensors of another, and its metadata with some values changed, added or (None) left out."""
    data = source.read_bytes()
    version, n_tensors = struct.unpack_from("<IQ", data, 4)
    ranges = GGUFMap(source).parts[0].entry_ranges
    entries = {name: data[offset : offset + size] for name, (offset, size) in ranges.items()}
    entries |= {name: _string(name) + _typed(value) for name, value in changes.items() if value is not None}
    kept = [entry for name, entry in entries.items() if changes.get(name, entry) is not None]
    # What follows the metadata does not depend on it, but for where the tensors begin.
    at = max(offset + size for offset, size in ranges.values())
    end = at
    for _ in range(n_tensors):
        end += 8 + struct.unpack_from("<Q", data, end)[0]
        end += 4 + 8 * struct.unpack_from("<I", data, end)[0] + 4 + 8
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, len(kept)) + b"".join(kept) + data[at:end]
    target.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data[end + -end % ALIGNMENT :])
    return target


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """Encode a value as GGUF does, its type before it. Lists of numbers are of int32 or float32."""
    if isinstance(value, list):
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        kind, form = (5, "i") if isinstance(value[0], int) else (6, "f")
        return struct.pack(f"<IIQ{len(value)}{form}", 9, kind, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    number, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{form}", number, value)


def with_control_tokens(
    source: Path, target: Path, control: Sequence[str], changes: Mapping[str, Any], kind: int = CONTROL
) -> Path:
    """Copy a model, giving the last ids of its vocabulary to these control tokens."""
    metadata = GGUFMap(source).metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
    tokens[-len(control) :] = control
    types[-len(control) :] = [kind] * len(control)
    own = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return copy_with(source, target, {**own, **changes})


def with_sentencepiece(source: Path, target: Path, control: Sequence[str], changes: Mapping[str, Any]) -> Path:
    """Copy a model, giving it a vocabulary in the manner of Llama 2, where texts begin with a space."""
    size = len(GGUFMap(source).metadata["tokenizer.ggml.tokens"])
    words = "▁ e t a o i n s h r d l u c m f w g y p b v k x j q z I N S T [ ] / ▁t ▁th ▁the ▁h ▁he ▁hi ▁y ▁yo ▁you"
    texts = ["<unk>", "<s>", "</s>", *control]
    types = [UNKNOWN, *[CONTROL] * (2 + len(control))]
    texts += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [BYTE] * 256
    texts += words.split()
    texts += [f"unused{number}" for number in range(size - len(texts))]
    types += [NORMAL] * (size - len(types))
    scores = [float(x) for x in np.where(np.array(types) == NORMAL, -np.arange(size, dtype=np.float32), 0)]
    own = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    return copy_with(source, target, {**own, **changes})


def rewritten(source: Path, target: Path, change: Callable[[str, Values], Values | None]) -> Path:
    """Write a model with other values in the tensors for which `change` gives some."""
    data = bytearray(source.read_bytes())
    for tensor in gguf.GGUFReader(source).tensors:
        values = change(tensor.name, np.array(tensor.data))
        if values is not None:
            assert values.shape == tensor.data.shape and values.dtype == tensor.data.dtype
            at = int(tensor.data_offset)
            data[at : at + values.nbytes] = values.tobytes()
    target.write_bytes(data)
    return target
