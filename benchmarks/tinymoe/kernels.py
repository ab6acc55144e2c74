"""Autograd functions over the C++ kernels (compiled once, at first use)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor


@cache
def kernel() -> Any:
    """The compiled extension. -ffast-math lets g++ vectorise exp() and the sums."""
    from torch.utils.cpp_extension import load

    sources = [
        str(Path(__file__).with_name(name)) for name in ("moe_kernel.cpp", "ops_kernel.cpp", "attention_kernel.cpp")
    ]
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp"]
    return load("tinymoe_kernels", sources, extra_cflags=flags, extra_ldflags=["-lmvec"])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, gate: Tensor, up_gate: Tensor, down: Tensor) -> Tensor:
        x, index, gate = x.contiguous(), index.contiguous(), gate.contiguous()
        ctx.save_for_backward(x, index, gate, up_gate, down)
        return cast(Tensor, kernel().experts_forward(x, index, gate, up_gate, down))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dgate, dup, ddown = kernel().experts_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return dx, None, dgate, dup, ddown


def experts(x: Tensor, index: Tensor, gate: Tensor, up_gate: Tensor, down: Tensor) -> Tensor:
    """Sum over the chosen experts of gate * down(silu(gate rows x) * (up rows x)).

    x (T, D), index (T, K) int64, gate (T, K), up_gate (E, 2F, D), down (E, D, F) -> (T, D).
    """
    return cast(Tensor, _Experts.apply(x, index, gate, up_gate, down))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, inverse = kernel().norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = kernel().norm_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over the root of its mean square, times weight (D,)."""
    return cast(Tensor, _Norm.apply(x, weight, eps))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return cast(Tensor, kernel().rotate(x.contiguous(), cos, sin, 1.0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return kernel().rotate(grads[0].contiguous(), cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (B, T, H, S), the halves of S paired (NEOX); cos and sin (T, S / 2)."""
    return cast(Tensor, _Rotate.apply(x, cos, sin))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, norm = kernel().attention_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, norm)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(kernel().attention_backward(grads[0].contiguous(), *ctx.saved_tensors))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: q (B, T, H, S), k and v (B, T, G, S) -> (B, T, H, S); H / G heads share a group."""
    return cast(Tensor, _Attention.apply(q, k, v))
