"""What a prompt says about nodes: how well each would predict it, and how much of what it wants each holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeshard.keep import Keep
from moeshard.plan import PlanNode

if TYPE_CHECKING:
    from moeshard.model import Model

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]

LOGIT_BYTES = 256 << 20
"""Logits held at once."""


@dataclass(frozen=True, eq=False)
class Probed:
    """How good G nodes are for a prompt of which T tokens were looked at."""

    goodness: Doubles
    """float64 (G,): larger is better."""
    influence: Doubles
    """float64 (G, T): what each token added to it, over or under what it would if all were alike; rows sum to 0."""

    def errors(self, best: int) -> Doubles:
        """Return float64 (G,): standard errors over tokens of each node's distance from node `best`; NaN for one token.

        Paired: what makes a token hard for every node is no uncertainty. Tokens count as independent, which they are
        not quite, so the errors are rather too small.
        """
        n = self.influence.shape[1]
        if n < 2:
            return np.full(self.goodness.shape, np.nan)
        errors: Doubles = np.sqrt(((self.influence - self.influence[best]) ** 2).sum(axis=1) * n / (n - 1))
        return errors


def by_loss(losses: npt.NDArray[np.floating]) -> Probed:
    """Judge nodes by how they predict a prompt: ``losses`` is (G, T), nats; the goodness is minus their mean."""
    wide = losses.astype(np.float64)
    mean = wide.mean(axis=1)
    return Probed(-mean, (mean[:, None] - wide) / wide.shape[1])


def by_saliency(wanted: Doubles, held: Doubles) -> Probed:
    """Judge nodes by the share that they hold of what the whole model's router wants for a prompt.

    Args:
        wanted: float64 (M, T): saliency (weight · norm of output, summed over the chosen experts) of each token.
        held: float64 (G, M, T): of that, what is of experts that each node holds.

    Returns:
        The goodness is the share of each layer's saliency, mean over layers, 0 to 1. Errors are those of a ratio of
        sums, to first order.
    """
    total = np.maximum(wanted.sum(axis=1), np.finfo(np.float64).tiny)
    share = held.sum(axis=2) / total
    influence = (held - share[:, :, None] * wanted) / total[:, None]
    return Probed(share.mean(axis=1), influence.mean(axis=1))


class Lanes:
    """The whole model and nodes as masks on it, side by side; nodes that use other numbers of experts per token than
    the model run on a model of their own, from the same file."""

    def __init__(self, model: Model, nodes: Sequence[PlanNode]):
        self._keeps = [node.keep for node in nodes]
        # Of each lane, what its sequences are: nodes, or -1 for the whole model.
        lanes: dict[int | None, list[int]] = {None: [-1]}
        for index, node in enumerate(nodes):
            used = node.n_expert_used
            same = used is None or all(model.routing.n_expert_used[layer] == used for layer in model.moe_layers)
            lanes.setdefault(None if same else used, []).append(index)
        self._lanes = [(model.sibling(n_expert_used=used) if used else model, rows) for used, rows in lanes.items()]

    def losses(self, tokens: Tokens, n_ctx: int) -> Floats:
        """Return float32 (1 + G, T): what predicting each of the T tokens after the first costs the whole model, and
        each node, nats. `n_ctx` is the most tokens that any prompt has: contexts are kept for the next one."""
        found = np.empty((1 + len(self._keeps), tokens.size - 1), dtype=np.float32)
        for model, rows in self._lanes:
            step = max(1, LOGIT_BYTES // (len(rows) * model.n_vocab * 4))
            with model.session(n_seq=len(rows), n_ctx=n_ctx) as session:
                for seq, node in enumerate(rows):
                    session.set_keep(None if node < 0 else self._keeps[node], seq)
                for at in range(0, tokens.size - 1, step):
                    inputs, targets = tokens[:-1][at : at + step], tokens[1:][at : at + step]
                    for seq, logits in session.decode(dict.fromkeys(range(len(rows)), inputs), "all").items():
                        chosen = logits[np.arange(targets.size), targets]
                        found[1 + rows[seq], at : at + step] = log_sum_exp(logits) - chosen
        return found


def log_sum_exp(logits: Floats) -> Floats:
    """Return float32 (n,) of logits (n, n_vocab)."""
    peak = logits.max(axis=1)
    norm: Floats = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
    return norm


def saliency(model: Model, keeps: Sequence[Keep], tokens: Tokens) -> tuple[Doubles, Doubles]:
    """Trace a prompt through the whole model; return `wanted` and `held` of `by_saliency`.

    Layers that the engine does not compute (next-token prediction) are left out.
    """
    trace = model.trace(tokens, norms=True)
    assert trace.norms is not None
    values = trace.weights.astype(np.float64) * trace.norms
    layers = np.array(trace.layers)[:, None, None]
    # Layers with fewer experts per token are padded with id -1, of weight 0.
    held = [np.where(np.asarray(keep)[layers, trace.ids], values, 0).sum(axis=2) for keep in keeps]
    return values.sum(axis=2), np.stack(held)
