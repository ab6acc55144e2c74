"""Muon for matrices (experts in one batched call), AdamW for embedding, router and norms.

Muon replaces a matrix's momentum by the nearest matrix with equal singular values; the coefficients of the
quintic iteration are those of its author's public description (Jordan et al., 2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """(..., rows, columns) -> the same shape, singular values moved close to 1.

    The quintic is applied to the Gram matrix of the short side: all factors are polynomials of it, so they commute,
    and for experts (32 x 192) this takes a quarter of the time of iterating on the matrix itself.
    """
    wide = m.shape[-2] <= m.shape[-1]
    x = m if wide else m.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    one = torch.eye(gram.shape[-1])
    product = one.expand_as(gram)
    for step in range(steps):
        factor = _A * one + _B * gram + _C * (gram @ gram)
        product = factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    x = product @ x
    return cast(Tensor, x if wide else x.mT)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Parameters are (rows, columns) or (E, rows, columns); `halves` splits rows."""

    def __init__(self, params: Iterable[dict[str, object]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "halves": 1, "decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(m, group["momentum"])  # Nesterov
                parts = g.reshape(-1, p.shape[-2] // group["halves"], p.shape[-1])
                update = orthogonalise(parts)
                scale = max(1.0, parts.shape[-2] / parts.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def optimisers(own: dict[str, nn.Parameter], muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over the named parameters, each parameter in exactly one."""
    joined, single, other = [], [], []
    for name, p in own.items():
        if name.endswith("up_gate"):
            joined.append(p)
        elif p.ndim >= 2 and not name.endswith(("embedding", "router")):
            single.append(p)
        else:
            other.append(p)
    muon = Muon([{"params": joined, "halves": 2}, {"params": single}], lr=muon_lr)
    adam = torch.optim.AdamW([{"params": other}], lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]


def optimiser_state(opts: list[torch.optim.Optimizer], own: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """What the optimisers remember, by the parameter's name."""
    return {name: opt.state[p] for opt in opts for name, p in own.items() if p in opt.state}


def restore(
    opts: list[torch.optim.Optimizer], own: dict[str, nn.Parameter], state: dict[str, dict[str, Tensor]]
) -> None:
    """The reverse of `optimiser_state`, whichever worker owned the parameter before."""
    for opt in opts:
        mine = {id(p) for group in opt.param_groups for p in group["params"]}
        for name, p in own.items():
            if id(p) in mine and name in state:
                opt.state[p] = state[name]
