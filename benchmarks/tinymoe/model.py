"""The models in torch. Shapes: B sequences, T tokens each, D width, E experts, K used, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .kernels import attention, experts, rms_norm, rotate


def matrix(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * gain * columns**-0.5)


class Norm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_table(size: int, length: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, size / 2)."""
    frequency = base ** (-torch.arange(0, size, 2).float() / size)
    angle = torch.arange(length).float()[:, None] * frequency
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q = matrix(c.heads * c.head_size, c.width)
        self.k = matrix(c.kv_heads * c.head_size, c.width)
        self.v = matrix(c.kv_heads * c.head_size, c.width)
        self.o = matrix(c.width, c.heads * c.head_size, 0.1)
        self.q_norm = Norm(c.head_size, c.eps) if c.qk_norm else nn.Identity()
        self.k_norm = Norm(c.head_size, c.eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        c = self.c
        q = self.q_norm(F.linear(x, self.q).view(b, t, c.heads, c.head_size))
        k = self.k_norm(F.linear(x, self.k).view(b, t, c.kv_heads, c.head_size))
        v = F.linear(x, self.v).view(b, t, c.kv_heads, c.head_size)
        y = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return F.linear(y.flatten(2), self.o)


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values of all heads come from one compressed row per token."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_a = matrix(c.q_rank, c.width)
        self.q_a_norm = Norm(c.q_rank, c.eps)
        self.q_b = matrix(c.heads * (c.head_size + c.rope_size), c.q_rank)
        self.kv_a = matrix(c.kv_rank + c.rope_size, c.width)
        self.kv_a_norm = Norm(c.kv_rank, c.eps)
        self.k_b = matrix(c.heads * c.head_size, c.kv_rank)
        self.v_b = matrix(c.heads * c.head_size, c.kv_rank)
        self.o = matrix(c.width, c.heads * c.head_size, 0.1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        c = self.c
        q = F.linear(self.q_a_norm(F.linear(x, self.q_a)), self.q_b).view(b, t, c.heads, -1)
        q_plain, q_rotated = q.split((c.head_size, c.rope_size), -1)
        latent, k_rotated = F.linear(x, self.kv_a).split((c.kv_rank, c.rope_size), -1)
        latent = self.kv_a_norm(latent)
        k_plain = F.linear(latent, self.k_b).view(b, t, c.heads, c.head_size)
        v = F.linear(latent, self.v_b).view(b, t, c.heads, c.head_size).transpose(1, 2)
        k_rotated = rotate(k_rotated.view(b, t, 1, c.rope_size), cos, sin).expand(b, t, c.heads, c.rope_size)
        q = torch.cat((q_plain, rotate(q_rotated, cos, sin)), -1).transpose(1, 2)
        k = torch.cat((k_plain, k_rotated), -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(b, t, -1), self.o)


class Dense(nn.Module):
    """A gated feed-forward that every token goes through."""

    def __init__(self, c: Config, width: int) -> None:
        super().__init__()
        self.gate, self.up = matrix(width, c.width), matrix(width, c.width)
        self.down = matrix(c.width, width, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


@dataclass
class Routing:
    """What a layer's router decided for N tokens: scores (N, E), chosen ids (N, K), their weights (N, K)."""

    scores: Tensor
    index: Tensor
    gate: Tensor


class Experts(nn.Module):
    """Router and experts. Softmax or sigmoid over E, top K, weights renormalised over the chosen.

    With sigmoid scores, a bias that no gradient reaches is added for the selection only.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.router = matrix(c.experts, c.width, 0.5)
        self.up_gate = nn.Parameter(torch.randn(c.experts, 2 * c.expert_width, c.width) * c.width**-0.5)
        self.down = nn.Parameter(torch.randn(c.experts, c.width, c.expert_width) * 0.1 * c.expert_width**-0.5)
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(c.experts) if c.sigmoid else None)
        self.shared = Dense(c, c.shared_width) if c.shared_width else None
        self.drop: Tensor | None = None  # (E,) bool: experts the router may not choose
        self.last: Routing | None = None

    def route(self, x: Tensor) -> Routing:
        logits = F.linear(x, self.router)
        scores = logits.sigmoid() if self.c.sigmoid else logits.softmax(-1)
        choice = scores if self.bias is None else scores + self.bias
        if self.drop is not None:  # the renormalised weights of those left are the same before and after softmax
            choice = choice.masked_fill(self.drop, float("-inf"))
        index = choice.topk(self.c.used, -1, sorted=False).indices
        gate = scores.gather(-1, index)
        return Routing(scores, index, gate / gate.sum(-1, keepdim=True) * self.c.gate_scale)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        routing = self.route(flat)
        self.last = routing
        y = experts(flat, routing.index, routing.gate, self.up_gate, self.down).view_as(x)
        return y if self.shared is None else y + cast(Tensor, self.shared(x))

    def load(self) -> Tensor:
        """Share of the tokens of the last batch that chose each expert, (E,); sums to K."""
        assert self.last is not None
        index = self.last.index.flatten()
        return torch.bincount(index, minlength=self.c.experts).float() * self.c.used / index.numel()

    def balance_loss(self, load: Tensor) -> Tensor:
        """1 when all experts are used alike, more when not.

        `load` (E,) is that of the last batches of all workers: balance is asked of the mixture of all domains,
        never of one sequence, so that experts may specialise.
        """
        assert self.last is not None
        share = self.last.scores / self.last.scores.sum(-1, keepdim=True)
        return (load / self.c.used * share.mean(0)).sum() * self.c.experts

    @torch.no_grad()
    def move_bias(self, rate: float, load: Tensor) -> None:
        """Make experts below the mean load easier to choose, those above harder."""
        if self.bias is not None:
            self.bias += rate * (self.c.used / self.c.experts - load).sign()


class Block(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(c.width, c.eps), Norm(c.width, c.eps)
        self.attention: LatentAttention | Attention = LatentAttention(c) if c.kv_rank else Attention(c)
        self.ffn: Dense | Experts = Dense(c, c.dense_width) if layer < c.dense_layers else Experts(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return cast(Tensor, x + self.ffn(self.ffn_norm(x)))


class Model(nn.Module):
    """Token ids (B, T) to logits (B, T, V). The embedding is also the output matrix."""

    cos: Tensor
    sin: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embedding = nn.Parameter(torch.randn(c.vocab, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm = Norm(c.width, c.eps)
        cos, sin = rope_table(c.rope_size, c.context, c.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embedding)
        t = tokens.shape[1]
        for block in self.layers():
            x = block(x, self.cos[:t], self.sin[:t])
        return cast(Tensor, self.norm(x))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.embedding)

    def layers(self) -> list[Block]:
        return [b for b in self.blocks if isinstance(b, Block)]

    def routers(self) -> list[Experts]:
        """The routed layers, in order."""
        return [m for m in self.modules() if isinstance(m, Experts)]


class _CrossEntropy(torch.autograd.Function):
    """Mean cross entropy of hidden @ matrix^T, in chunks of tokens that stay in cache.

    The gradients are computed on the way, so that the (tokens, V) logits are made once and never stored.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        n = hidden.shape[0]
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        loss = hidden.new_zeros(())
        for h, y, d in zip(*(x.split(_CrossEntropy.CHUNK) for x in (hidden, target, d_hidden)), strict=True):
            logits = h @ weight.t()
            picked = logits.gather(1, y[:, None])
            norm = logits.logsumexp(1, keepdim=True)
            loss += (norm - picked).sum()
            p = logits.sub_(norm).exp_().scatter_add_(1, y[:, None], -torch.ones_like(picked)).div_(n)
            torch.mm(p, weight, out=d)
            d_weight.addmm_(p.t(), h)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], d_weight * grads[0], None


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """hidden (N, D), weight (V, D), target (N,) -> mean loss in nats."""
    return cast(Tensor, _CrossEntropy.apply(hidden, weight, target))
