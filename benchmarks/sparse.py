"""Write a GGUF of the shape of Kimi-K2.5 that is all hole: some 500 GB to read, some megabytes on the disk.

    python benchmarks/sparse.py OUT.gguf

Header, metadata and tensors are those that llama.cpp needs of architecture deepseek2; every weight is zero. What is
tried with it is what does not depend on weights: planning, splitting, verifying. With --layers and --experts it becomes
small enough to be loaded.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


@dataclass(frozen=True)
class Shape:
    """Kimi-K2.5: DeepSeek-V3's architecture with more experts and fewer heads."""

    n_layer: int = 61
    n_layer_dense: int = 1
    n_vocab: int = 163840
    n_embd: int = 7168
    n_head: int = 64
    q_lora: int = 1536
    kv_lora: int = 512
    head_nope: int = 128
    head_rope: int = 64
    head_value: int = 128
    n_ff: int = 18432
    n_ff_exp: int = 2048
    n_expert: int = 384
    n_expert_used: int = 8
    n_expert_shared: int = 1


def add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name("sparse Kimi-K2.5")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(262144)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(1)  # latent attention: all heads share what is kept
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(shape.head_rope)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_leading_dense_block_count(shape.n_layer_dense)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_q_lora_rank(shape.q_lora)
    writer.add_kv_lora_rank(shape.kv_lora)
    writer.add_key_length(shape.kv_lora + shape.head_rope)
    writer.add_value_length(shape.kv_lora)
    writer.add_key_length_mla(shape.head_nope + shape.head_rope)
    writer.add_value_length_mla(shape.head_value)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    writer.add_expert_shared_count(shape.n_expert_shared)
    writer.add_expert_feed_forward_length(shape.n_ff_exp)
    writer.add_expert_weights_scale(2.827)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("kimi-k2")
    writer.add_token_list([f"token{i}" for i in range(shape.n_vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.n_vocab)
    writer.add_token_merges([f"token{i} token{i + 1}" for i in range(shape.n_vocab - 256)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def add_tensors(writer: gguf.GGUFWriter, shape: Shape) -> int:
    """Add the tensor directory; return the bytes of the data it speaks of."""
    total = 0

    def tensor(name: str, *dims: int, kind: Type = Type.Q8_0) -> None:
        nonlocal total
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(dims, dtype=np.int64)) // block * size
        # The type of numpy counts for nothing beside a raw one.
        writer.add_tensor_info(name, dims, np.dtype(np.float32), nbytes, raw_dtype=kind)
        total += gguf.GGUFWriter.ggml_pad(nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)

    head = shape.head_nope + shape.head_rope
    tensor("token_embd.weight", shape.n_vocab, shape.n_embd)
    tensor("output_norm.weight", shape.n_embd, kind=Type.F32)
    tensor("output.weight", shape.n_vocab, shape.n_embd)
    for layer in range(shape.n_layer):
        block = f"blk.{layer}."
        tensor(block + "attn_norm.weight", shape.n_embd, kind=Type.F32)
        tensor(block + "attn_q_a.weight", shape.q_lora, shape.n_embd)
        tensor(block + "attn_q_a_norm.weight", shape.q_lora, kind=Type.F32)
        tensor(block + "attn_q_b.weight", shape.n_head * head, shape.q_lora)
        tensor(block + "attn_kv_a_mqa.weight", shape.kv_lora + shape.head_rope, shape.n_embd)
        tensor(block + "attn_kv_a_norm.weight", shape.kv_lora, kind=Type.F32)
        tensor(block + "attn_k_b.weight", shape.n_head, shape.kv_lora, shape.head_nope)
        tensor(block + "attn_v_b.weight", shape.n_head, shape.head_value, shape.kv_lora)
        tensor(block + "attn_output.weight", shape.n_embd, shape.n_head * shape.head_value)
        tensor(block + "ffn_norm.weight", shape.n_embd, kind=Type.F32)
        if layer < shape.n_layer_dense:
            tensor(block + "ffn_gate.weight", shape.n_ff, shape.n_embd)
            tensor(block + "ffn_down.weight", shape.n_embd, shape.n_ff)
            tensor(block + "ffn_up.weight", shape.n_ff, shape.n_embd)
            continue
        shared = shape.n_expert_shared * shape.n_ff_exp
        tensor(block + "ffn_gate_inp.weight", shape.n_expert, shape.n_embd, kind=Type.F32)
        tensor(block + "exp_probs_b.bias", shape.n_expert, kind=Type.F32)
        tensor(block + "ffn_down_exps.weight", shape.n_expert, shape.n_embd, shape.n_ff_exp, kind=Type.Q4_K)
        tensor(block + "ffn_gate_exps.weight", shape.n_expert, shape.n_ff_exp, shape.n_embd, kind=Type.Q4_K)
        tensor(block + "ffn_up_exps.weight", shape.n_expert, shape.n_ff_exp, shape.n_embd, kind=Type.Q4_K)
        tensor(block + "ffn_gate_shexp.weight", shared, shape.n_embd)
        tensor(block + "ffn_down_shexp.weight", shape.n_embd, shared)
        tensor(block + "ffn_up_shexp.weight", shared, shape.n_embd)
    return total


def write(path: Path, shape: Shape | None = None) -> None:
    shape = shape or Shape()
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_metadata(writer, shape)
    data = add_tensors(writer, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = gguf.GGUFWriter.ggml_pad(path.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT)
    os.truncate(path, header + data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=Shape.n_layer)
    parser.add_argument("--experts", type=int, default=Shape.n_expert)
    args = parser.parse_args()
    write(args.out, Shape(n_layer=args.layers, n_expert=args.experts))
    status = args.out.stat()
    print(f"{args.out}: {status.st_size / 2**30:.0f} GiB, of which {status.st_blocks / 2**11:.0f} MiB are on the disk")


if __name__ == "__main__":
    main()
