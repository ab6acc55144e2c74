"""Shapes of the models. One frozen record per model; nothing else decides a shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Shape of a model. All row lengths are multiples of 32, as Q8_0 blocks need."""

    arch: str  # as llama.cpp names it: qwen3moe, llama, deepseek2
    vocab: int = 4096
    width: int = 192
    layers: int = 5
    heads: int = 6
    kv_heads: int = 2
    head_size: int = 32
    experts: int = 128
    used: int = 8
    expert_width: int = 32
    qk_norm: bool = True
    sigmoid: bool = False  # sigmoid scores and a selection bias instead of softmax
    gate_scale: float = 1.0  # factor on the weights of the chosen experts
    shared_width: int = 0  # width of the expert that every token uses (0: none)
    dense_layers: int = 0  # layers at the front with a dense feed-forward of `dense_width`
    dense_width: int = 0
    q_rank: int = 0  # multi-head latent attention: compressed queries, keys and values (0: plain heads);
    kv_rank: int = 0  # its heads add `rope_size` rotated entries to `head_size` plain ones
    rope_size: int = 32
    rope_base: float = 10_000.0
    context: int = 512
    eps: float = 1e-6


CONFIGS = {
    "tinymoe": Config("qwen3moe"),
    # Shaped as Kimi-K2, which llama.cpp runs as deepseek2.
    "tinymoe-sigmoid": Config(
        "deepseek2", width=128, layers=4, heads=4, kv_heads=4, qk_norm=False, sigmoid=True, gate_scale=2.0,
        shared_width=32, dense_layers=1, dense_width=512, q_rank=96, kv_rank=64,
    ),
    # Shaped as Mixtral, which llama.cpp runs as llama.
    "tinymoe-mixtral": Config("llama", layers=4, experts=8, used=2, expert_width=256, qk_norm=False),
}  # fmt: skip
