"""The C++ kernels against the same formulas in plain torch, values and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinymoe.kernels import attention, experts, rms_norm, rotate
from tinymoe.model import cross_entropy
from tinymoe.optim import orthogonalise

T, D, WIDTH, E, K = 200, 64, 32, 16, 3


def close(a: Tensor, b: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(a)
    for x, y in zip(torch.autograd.grad(a, inputs, g), torch.autograd.grad(b, inputs, g), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_experts() -> None:
    torch.manual_seed(0)
    x = torch.randn(T, D, requires_grad=True)
    up_gate = torch.randn(E, 2 * WIDTH, D).mul_(D**-0.5).requires_grad_()
    down = torch.randn(E, D, WIDTH).requires_grad_()
    gate, index = torch.rand(T, E).topk(K, -1)
    index[index == 5] = 6  # expert 5 gets no token, and some tokens name expert 6 twice
    gate.requires_grad_()
    y = torch.zeros(T, D)
    for k in range(K):
        h = torch.einsum("tfd,td->tf", up_gate[index[:, k]], x)
        h = F.silu(h[:, :WIDTH]) * h[:, WIDTH:]
        y = y + gate[:, k : k + 1] * torch.einsum("tdf,tf->td", down[index[:, k]], h)
    close(experts(x, index, gate, up_gate, down), y, (x, gate, up_gate, down))


def test_experts_threads() -> None:
    torch.manual_seed(0)
    x, index, gate = torch.randn(T, D), torch.randint(E, (T, K)), torch.rand(T, K)
    up_gate, down = torch.randn(E, 2 * WIDTH, D), torch.randn(E, D, WIDTH)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(experts(x, index, gate, up_gate, down))
    torch.set_num_threads(before)
    torch.testing.assert_close(*results)


def test_norm() -> None:
    x, w = torch.randn(5, 7, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    close(rms_norm(x, w, 1e-6), F.rms_norm(x, (32,), w, 1e-6), (x, w))


def test_rotate() -> None:
    x, angle = torch.randn(2, 7, 4, 32, requires_grad=True), torch.randn(7, 16)
    a, b = x.chunk(2, -1)
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    close(rotate(x, angle.cos(), angle.sin()), torch.cat((a * c - b * s, b * c + a * s), -1), (x,))


def test_attention() -> None:
    for t in (1, 63, 200):  # less than a block, and a last block that is not whole
        q = torch.randn(2, t, 6, 32, requires_grad=True)
        k, v = torch.randn(2, t, 2, 32, requires_grad=True), torch.randn(2, t, 2, 32, requires_grad=True)
        a, b, c = (x.transpose(1, 2) for x in (q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2)))
        expected = F.scaled_dot_product_attention(a, b, c, is_causal=True).transpose(1, 2)
        close(attention(q, k, v), expected, (q, k, v))


def test_cross_entropy_over_several_chunks() -> None:
    hidden, weight = torch.randn(1100, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    target = torch.randint(50, (1100,))
    close(cross_entropy(hidden, weight, target), F.cross_entropy(hidden @ weight.t(), target), (hidden, weight))


def test_orthogonalise_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((4, 32, 96), (96, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
