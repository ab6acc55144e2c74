"""Copies of the embedded model with other metadata: templates, names, control tokens, another tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def copy_with(source: Path, target: Path, changes: Mapping[str, Any]) -> Path:
    """Write a GGUF with the tensors of another, and its metadata with some values changed, added or (None) left out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    values = {
        name: (field.contents(), field.types[0], field.types[-1])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    for name, value in changes.items():
        values[name] = (value, *_types(value))
    for name, (value, kind, item) in values.items():
        if value is not None:
            writer.add_key_value(name, value, kind, item if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _types(value: Any) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType]:
    kinds = {
        str: gguf.GGUFValueType.STRING,
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
    }
    if isinstance(value, list):
        item = gguf.GGUFValueType.INT32 if isinstance(value[0], int) else kinds[type(value[0])]
        return gguf.GGUFValueType.ARRAY, item
    kind = kinds.get(type(value), gguf.GGUFValueType.STRING)
    return kind, kind


def with_control_tokens(
    source: Path, target: Path, control: Sequence[str], changes: Mapping[str, Any], kind: int = CONTROL
) -> Path:
    """Copy a model, giving the last ids of its vocabulary to these control tokens."""
    reader = gguf.GGUFReader(source)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    tokens[-len(control) :] = control
    types[-len(control) :] = [kind] * len(control)
    own = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return copy_with(source, target, {**own, **changes})


def with_sentencepiece(source: Path, target: Path, control: Sequence[str], changes: Mapping[str, Any]) -> Path:
    """Copy a model, giving it a vocabulary in the manner of Llama 2, where texts begin with a space."""
    size = len(gguf.GGUFReader(source).fields["tokenizer.ggml.tokens"].contents())
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
