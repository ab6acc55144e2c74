"""Measurements on a trained model: bits per byte, agreement with torch, routing, what dropping experts costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Experts, Model

#: Tokens of a window; its first token is context only, the next WINDOW ones are scored.
WINDOW = 256

#: Rounding in F32 stays under this, unless it makes a near tie of two experts fall the other way.
CLOSE = 1e-3

Logits = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]


def windows(tokens: list[int], most: int | None = None) -> npt.NDArray[np.int64]:
    """Whole windows of WINDOW + 1 tokens, each starting at the last token of the one before, (N, WINDOW + 1)."""
    n = (len(tokens) - 1) // WINDOW
    n = n if most is None else min(n, most)
    return np.stack([np.array(tokens[i * WINDOW : (i + 1) * WINDOW + 1], dtype=np.int64) for i in range(n)])


def loss(logits: npt.NDArray[np.float32], target: npt.NDArray[np.int64]) -> float:
    """Sum of the negative log-likelihoods, nats."""
    return float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(target), reduction="sum"))


def bits_per_byte(
    logits: Logits, tokenize: Callable[[bytes], list[int]], detokenize: Callable[[list[int]], bytes], text: bytes
) -> float:
    """Bits per byte of `text` in windows of WINDOW tokens, each from an empty context, all targets scored."""
    nats, size = 0.0, 0
    for row in windows(tokenize(text)):
        nats += loss(logits(row[:-1]), row[1:])
        size += len(detokenize(row[1:].tolist()))
    return nats / math.log(2) / size


def torch_logits(model: Model) -> Logits:
    @torch.no_grad()
    def run(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return model(torch.from_numpy(tokens)[None])[0].numpy()  # type: ignore[no-any-return]

    return run


@dataclass
class Agreement:
    """How close logits of a file are to those of torch in F32."""

    largest_difference: float  # over the largest absolute logit
    close: float  # share of the windows in which no difference is over CLOSE of the largest absolute logit
    top1: float  # share of positions with the same most likely token
    kl: float  # mean Kullback-Leibler divergence from torch's distribution, nats


def agreement(reference: list[npt.NDArray[np.float32]], other: list[npt.NDArray[np.float32]]) -> Agreement:
    a, b = torch.from_numpy(np.concatenate(reference)), torch.from_numpy(np.concatenate(other))
    scale = float(a.abs().max())
    per_window = [float(np.abs(x - y).max()) / scale for x, y in zip(reference, other, strict=True)]
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return Agreement(
        largest_difference=max(per_window),
        close=float(np.mean(np.array(per_window) < CLOSE)),
        top1=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
    )


@dataclass
class RoutingProfile:
    """What the routers did on some tokens; rows are the routed layers."""

    load: Tensor  # (layers, E): share of tokens that chose the expert
    mass: Tensor  # (layers, E): mean weight, 0 where not chosen
    saliency: Tensor  # (layers, E): mean of weight x norm of the expert's output
    entropy: Tensor  # (layers,): mean entropy of a token's scores, nats


def _output_norms(layer: Experts, x: Tensor, index: Tensor) -> Tensor:
    """Norm of the output of every chosen expert: x (N, D), index (N, K) -> (N, K)."""
    out = torch.zeros(index.shape)
    gate, up = layer.up_gate.chunk(2, dim=1)
    for e in range(layer.c.experts):
        token, slot = (index == e).nonzero(as_tuple=True)
        rows = x[token]
        y = F.linear(F.silu(F.linear(rows, gate[e])) * F.linear(rows, up[e]), layer.down[e])
        out[token, slot] = y.norm(dim=-1)
    return out


@torch.no_grad()
def profile(model: Model, rows: npt.NDArray[np.int64]) -> RoutingProfile:
    """Profile of windows (N, WINDOW + 1); the last token of a row is not run."""
    routers = model.routers()
    seen: dict[int, Tensor] = {}

    def remember(i: int) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(i, args[0].flatten(0, 1))

    hooks = [r.register_forward_pre_hook(remember(i)) for i, r in enumerate(routers)]
    n, experts = len(routers), model.c.experts
    load, mass, saliency = (torch.zeros(n, experts) for _ in range(3))
    entropy = torch.zeros(n)
    tokens = 0
    for batch in torch.from_numpy(rows[:, :-1]).split(16):
        model(batch)
        tokens += batch.numel()
        for i, router in enumerate(routers):
            assert router.last is not None
            r = router.last
            flat = r.index.flatten()
            norms = _output_norms(router, seen[i], r.index)
            load[i].index_add_(0, flat, torch.ones(len(flat)))
            mass[i].index_add_(0, flat, r.gate.flatten())
            saliency[i].index_add_(0, flat, (r.gate * norms).flatten())
            p = r.scores / r.scores.sum(-1, keepdim=True)
            entropy[i] -= (p * p.clamp_min(1e-30).log()).sum()
    for hook in hooks:
        hook.remove()
    return RoutingProfile(load / tokens, mass / tokens, saliency / tokens, entropy / tokens)


def most_salient(saliency: Tensor, count: int) -> Tensor:
    """(layers, E) bool: the `count` experts of highest saliency of each layer."""
    keep = torch.zeros_like(saliency, dtype=torch.bool)
    return keep.scatter_(1, saliency.topk(count, dim=1).indices, True)


def overlap(a: Tensor, b: Tensor) -> float:
    """Share of the experts kept in `a` that `b` keeps too, mean over layers."""
    return float(((a & b).sum(1) / a.sum(1)).mean())


def set_keep(model: Model, keep: Tensor | None) -> None:
    """Let the routers choose kept experts only, (layers, E) bool; None for all."""
    for i, router in enumerate(model.routers()):
        router.drop = None if keep is None else ~keep[i]


def random_keep(layers: int, experts: int, count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return most_salient(torch.rand(layers, experts, generator=g), count)


@torch.no_grad()
def nll(model: Model, rows: npt.NDArray[np.int64], keep: Tensor | None = None) -> float:
    """Mean negative log-likelihood per token of windows (N, WINDOW + 1), nats."""
    set_keep(model, keep)
    total = 0.0
    for batch in torch.from_numpy(rows).split(16):
        total += float(F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    set_keep(model, None)
    return total / rows[:, 1:].size
