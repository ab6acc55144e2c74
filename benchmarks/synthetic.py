"""Write a GGUF of the shapes of a real Mixture-of-Experts model with random weights.

    python benchmarks/synthetic.py OUT.gguf --layers 2
    python benchmarks/synthetic.py OUT.gguf --layers 48 --narrow 4    # as deep as the real one, a quarter as wide
    python benchmarks/synthetic.py OUT.gguf --vocab 151936            # with as many tokens

Architecture qwen3moe with the shapes of Qwen3-30B-A3B, of any layer count, in Q8_0, with the tokenizer (and so the
vocabulary) of the embedded model, to which tokens can be added that no text has. Its text is noise; its speed and its
layout are those of the real one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

import moeshard

BLOCK = 32  # weights per Q8_0 block: an fp16 scale and 32 int8


@dataclass(frozen=True)
class Shape:
    """Qwen3-30B-A3B."""

    n_embd: int = 2048
    n_head: int = 32
    n_head_kv: int = 4
    head_size: int = 128
    n_expert: int = 128
    n_expert_used: int = 8
    n_ff_exp: int = 768

    def narrowed(self, by: int) -> Shape:
        """Return a shape whose layers are a part as wide, with as many experts."""
        return replace(
            self,
            n_embd=self.n_embd // by,
            n_head=self.n_head // by,
            n_head_kv=max(1, self.n_head_kv // by),
            n_ff_exp=self.n_ff_exp // by,
        )


def q8_0(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.uint8]:
    """Return random Q8_0 blocks for weights of `shape` (innermost last), about N(0, 1/fan-in)."""
    *outer, n = shape
    blocks = np.empty((*outer, n // BLOCK, 2 + BLOCK), dtype=np.uint8)
    scale = np.array([n**-0.5 / 73], dtype=np.float16)  # the standard deviation of uniform int8 is 73
    blocks[..., :2] = scale.view(np.uint8)
    blocks[..., 2:] = rng.integers(0, 256, (*outer, n // BLOCK, BLOCK), dtype=np.uint8)
    return blocks.reshape(*outer, n // BLOCK * (2 + BLOCK))


def copy_tokenizer(writer: gguf.GGUFWriter, source: gguf.GGUFReader, n_vocab: int) -> int:
    """Carry the tokenizer's metadata over, with more tokens where it has fewer; return how many there are."""
    n_own = len(source.fields["tokenizer.ggml.tokens"].data)
    more = range(n_own, n_vocab)
    added = {
        "tokenizer.ggml.tokens": [f"token{number}" for number in more],
        "tokenizer.ggml.token_type": [int(gguf.TokenType.NORMAL) for _ in more],
    }
    for field in source.fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        sub_type = field.types[1] if len(field.types) > 1 else None
        value = field.contents()
        if field.name in added:
            value = [*value, *added[field.name]]
        writer.add_key_value(field.name, value, field.types[0], sub_type)
    return max(n_own, n_vocab)


def write(path: Path, n_layer: int, shape: Shape | None = None, seed: int = 0, n_vocab: int = 0) -> None:
    """Write the model, with at least `n_vocab` tokens; peak memory is one tensor."""
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen3moe", use_temp_file=True)
    writer.add_name("synthetic Qwen3-30B-A3B")
    writer.add_block_count(n_layer)
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff_exp * shape.n_expert_used)
    writer.add_expert_feed_forward_length(shape.n_ff_exp)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    n_vocab = copy_tokenizer(writer, gguf.GGUFReader(moeshard.embedded_model()), n_vocab)

    def quantised(name: str, *dims: int) -> None:
        writer.add_tensor(name, q8_0(rng, *dims), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def ones(name: str, n: int) -> None:
        writer.add_tensor(name, np.ones(n, dtype=np.float32))

    quantised("token_embd.weight", n_vocab, shape.n_embd)
    quantised("output.weight", n_vocab, shape.n_embd)
    ones("output_norm.weight", shape.n_embd)
    heads, heads_kv = shape.n_head * shape.head_size, shape.n_head_kv * shape.head_size
    for layer in range(n_layer):
        block = f"blk.{layer}."
        ones(block + "attn_norm.weight", shape.n_embd)
        ones(block + "ffn_norm.weight", shape.n_embd)
        ones(block + "attn_q_norm.weight", shape.head_size)
        ones(block + "attn_k_norm.weight", shape.head_size)
        quantised(block + "attn_q.weight", heads, shape.n_embd)
        quantised(block + "attn_k.weight", heads_kv, shape.n_embd)
        quantised(block + "attn_v.weight", heads_kv, shape.n_embd)
        quantised(block + "attn_output.weight", shape.n_embd, heads)
        router = rng.standard_normal((shape.n_expert, shape.n_embd), dtype=np.float32) / shape.n_embd**0.5
        writer.add_tensor(block + "ffn_gate_inp.weight", router)
        quantised(block + "ffn_gate_exps.weight", shape.n_expert, shape.n_ff_exp, shape.n_embd)
        quantised(block + "ffn_up_exps.weight", shape.n_expert, shape.n_ff_exp, shape.n_embd)
        quantised(block + "ffn_down_exps.weight", shape.n_expert, shape.n_embd, shape.n_ff_exp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--narrow", type=int, choices=(1, 2, 4, 8), default=1, help="divide the width by this")
    parser.add_argument("--vocab", type=int, default=0, help="at least so many tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.layers, Shape().narrowed(args.narrow), seed=args.seed, n_vocab=args.vocab)
    print(f"{args.out}: {args.layers} layers, {args.out.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
