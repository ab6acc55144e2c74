"""`python -m tinymoe export`: a checkpoint to GGUF, in F32, F16 or Q8_0."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR
from gguf import GGMLQuantizationType as Type

from .config import Config
from .model import Experts, LatentAttention, Model, Norm
from .tokens import EOT

Array = npt.NDArray[np.float32]

TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


_EXPERTS = (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP)


def interleave(rows: Array, heads: int, size: int) -> Array:
    """Reorder the last `size` rows of each head from paired halves (as trained) to paired neighbours.

    llama.cpp rotates neighbours in `llama` and `deepseek2`. rows (heads * head rows, columns).
    """
    r = rows.reshape(heads, -1, rows.shape[-1])
    plain, rotated = r[:, :-size], r[:, -size:]
    pairs = rotated.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(heads, size, -1)
    return np.concatenate([plain, pairs], 1).reshape(rows.shape)


def numpy(t: torch.Tensor) -> Array:
    return t.detach().float().contiguous().numpy()


def tensors(model: Model) -> dict[tuple[MODEL_TENSOR, int], Array]:
    """Every tensor of the file by llama.cpp's name and layer; matrices as (rows, columns)."""
    c, names = model.c, MODEL_TENSOR
    out = {(names.TOKEN_EMBD, -1): numpy(model.embedding), (names.OUTPUT_NORM, -1): numpy(model.norm.weight)}
    for i, block in enumerate(model.layers()):
        a, f = block.attention, block.ffn
        out[names.ATTN_NORM, i] = numpy(block.attention_norm.weight)
        out[names.FFN_NORM, i] = numpy(block.ffn_norm.weight)
        if isinstance(a, LatentAttention):
            out[names.ATTN_Q_A, i], out[names.ATTN_Q_A_NORM, i] = numpy(a.q_a), numpy(a.q_a_norm.weight)
            out[names.ATTN_Q_B, i] = interleave(numpy(a.q_b), c.heads, c.rope_size)
            out[names.ATTN_KV_A_MQA, i] = interleave(numpy(a.kv_a), 1, c.rope_size)
            out[names.ATTN_KV_A_NORM, i] = numpy(a.kv_a_norm.weight)
            heads = (c.heads, c.head_size, c.kv_rank)
            out[names.ATTN_K_B, i] = np.ascontiguousarray(numpy(a.k_b).reshape(heads).swapaxes(1, 2))
            out[names.ATTN_V_B, i] = numpy(a.v_b).reshape(heads)
        else:
            q, k = numpy(a.q), numpy(a.k)
            neox = c.arch == "qwen3moe"
            out[names.ATTN_Q, i] = q if neox else interleave(q, c.heads, c.head_size)
            out[names.ATTN_K, i] = k if neox else interleave(k, c.kv_heads, c.head_size)
            out[names.ATTN_V, i] = numpy(a.v)
            if isinstance(a.q_norm, Norm) and isinstance(a.k_norm, Norm):
                out[names.ATTN_Q_NORM, i] = numpy(a.q_norm.weight)
                out[names.ATTN_K_NORM, i] = numpy(a.k_norm.weight)
        out[names.ATTN_OUT, i] = numpy(a.o)
        if not isinstance(f, Experts):
            out[names.FFN_GATE, i], out[names.FFN_UP, i], out[names.FFN_DOWN, i] = (
                numpy(f.gate),
                numpy(f.up),
                numpy(f.down),
            )
            continue
        gate, up = np.split(numpy(f.up_gate), 2, axis=1)
        out[names.FFN_GATE_INP, i], out[names.FFN_DOWN_EXP, i] = numpy(f.router), numpy(f.down)
        out[names.FFN_GATE_EXP, i], out[names.FFN_UP_EXP, i] = gate, up
        if f.bias is not None:
            out[names.FFN_EXP_PROBS_B, i] = numpy(f.bias)
        if f.shared is not None:
            s = f.shared
            out[names.FFN_GATE_SHEXP, i], out[names.FFN_UP_SHEXP, i] = numpy(s.gate), numpy(s.up)
            out[names.FFN_DOWN_SHEXP, i] = numpy(s.down)
    return out


def full_name(tensor: MODEL_TENSOR, layer: int) -> str:
    suffix = "bias" if tensor == MODEL_TENSOR.FFN_EXP_PROBS_B else "weight"
    return f"{gguf.TENSOR_NAMES[tensor].format(bid=layer)}.{suffix}"


def add_shape(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_context_length(c.context)
    w.add_block_count(c.layers)
    w.add_embedding_length(c.width)
    w.add_vocab_size(c.vocab)
    w.add_head_count(c.heads)
    w.add_rope_dimension_count(c.rope_size)
    w.add_rope_freq_base(c.rope_base)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_expert_count(c.experts)
    w.add_expert_used_count(c.used)
    if c.arch != "llama":
        w.add_expert_feed_forward_length(c.expert_width)
    if c.arch != "deepseek2":
        # llama (Mixtral) reads the experts' width here; qwen3moe only wants the key to be there.
        w.add_feed_forward_length(c.expert_width if c.arch == "llama" else c.expert_width * c.used)
        w.add_head_count_kv(c.kv_heads)
        w.add_key_length(c.head_size)
        w.add_value_length(c.head_size)
        return
    w.add_feed_forward_length(c.dense_width)
    w.add_head_count_kv(1)  # the cache holds one compressed row per token
    w.add_key_length(c.kv_rank + c.rope_size)
    w.add_value_length(c.kv_rank)
    w.add_key_length_mla(c.head_size + c.rope_size)
    w.add_value_length_mla(c.head_size)
    w.add_q_lora_rank(c.q_rank)
    w.add_kv_lora_rank(c.kv_rank)
    w.add_leading_dense_block_count(c.dense_layers)
    w.add_expert_shared_count(1)
    w.add_expert_weights_scale(c.gate_scale)
    w.add_expert_weights_norm(True)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def add_tokenizer(w: gguf.GGUFWriter, path: Path, vocab: int) -> None:
    bpe = json.loads(path.read_text())["model"]
    tokens = [f"[unused{i}]" for i in range(vocab)]
    types = [gguf.TokenType.UNUSED] * vocab
    for token, i in bpe["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    end = bpe["vocab"][EOT]
    types[end] = gguf.TokenType.CONTROL
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    w.add_bos_token_id(end)
    w.add_eos_token_id(end)
    w.add_add_bos_token(False)


def write(model: Model, tokenizer: Path, path: Path, kind: str, name: str) -> None:
    """Write `model` to `path` in `kind`; router, bias and norms always in F32 (as llama.cpp does).

    Q8_0 is for the experts, nearly all of the file; what every token goes through stays in F16, of which llama.cpp
    does not quantise the activations either. With all in Q8_0 the likeliest token was another one in 2 of 100 places.
    """
    c = model.c
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == c.arch)
    assert isinstance(arch, MODEL_ARCH)
    quantized, file_type = TYPES[kind]
    w = gguf.GGUFWriter(path, c.arch)
    w.add_name(name)
    w.add_file_type(file_type)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(w, c)
    add_tokenizer(w, tokenizer, c.vocab)
    for (tensor, layer), value in tensors(model).items():
        target = Type.F32 if value.ndim == 1 or tensor == MODEL_TENSOR.FFN_GATE_INP else quantized
        if target == Type.Q8_0 and tensor not in _EXPERTS:
            target = Type.F16
        w.add_tensor(full_name(tensor, layer), gguf.quantize(value, target), raw_dtype=target)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def read(path: Path, c: Config) -> Model:
    """The model of a file that `write` wrote: what a later training starts from when no checkpoint is left.

    `tensors` only moves numbers about, so a model filled with their positions shows where each one goes.
    """
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    model = Model(c)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    flat = torch.arange(sum(s.numel() for s in shapes.values()), dtype=torch.float32)

    def fill() -> None:
        parts = flat.split([s.numel() for s in shapes.values()])
        model.load_state_dict({n: x.view(s) for (n, s), x in zip(shapes.items(), parts, strict=True)})

    fill()
    for (tensor, layer), position in tensors(model).items():
        value = torch.tensor(stored[full_name(tensor, layer)], dtype=torch.float32)
        flat[torch.from_numpy(position).flatten().long()] = value.flatten()
    fill()
    return model


def load(checkpoint: Path) -> Model:
    """The model of a training checkpoint."""
    state = torch.load(checkpoint, weights_only=False)
    model = Model(state["config"])
    model.load_state_dict(state["model"])
    return model.eval()


def export(checkpoint: Path, tokenizer: Path, out: Path, name: str) -> list[Path]:
    """Write NAME-f32.gguf, NAME-f16.gguf and NAME-q8_0.gguf under `out`."""
    model = load(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in TYPES:
        paths.append(out / f"{name}-{kind}.gguf")
        write(model, tokenizer, paths[-1], kind, name)
    return paths
