"""What a prompt says about nodes: how well each would predict it, and how much of what it wants each holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Doubles, Floats, Tokens
from moeshard.keep.text import Keep
from moeshard.placement.nodes import NodeModel, by_model
from moeshard.runtime.logits import LOGIT_BYTES, token_losses
from moeshard.runtime.trace import check_finite

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

Probe = Literal["both", "loss", "saliency"]
PROBES: tuple[Probe, ...] = get_args(Probe)


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


def goodness(probe: str, losses: Doubles, captured: Doubles) -> Doubles:
    """Return how good nodes are for prompts by a probe: larger is better.

    Args:
        probe: one of `PROBES`: ``loss``: minus the loss; ``saliency``: the share captured; ``both``: minus the loss
            plus the logarithm of the share.
        losses: float64, mean negative log-likelihood of a prompt on a node, nats per token.
        captured: float64 of the same shape: share of the prompt's saliency that the node holds, 0 to 1.

    Raises:
        MoeshardError: there is no such probe.
    """
    if probe == "loss":
        return -losses
    if probe == "saliency":
        return captured
    if probe == "both":
        both: Doubles = np.log(np.maximum(captured, np.finfo(np.float64).tiny)) - losses
        return both
    raise MoeshardError(f"unknown probe '{probe}'; choose both, loss, saliency or oracle")


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


def by_both(losses: npt.NDArray[np.floating], wanted: Doubles, held: Doubles) -> Probed:
    """Judge nodes by loss and saliency together: the goodness is minus the mean loss plus the logarithm of the share.

    The loss of a short prompt hangs on a few hard tokens, its saliency on all tokens but not on what comes out; each
    corrects the other.

    Args:
        losses: (G, T - 1), nats, of the tokens after the first.
        wanted, held: of the same T tokens, see `by_saliency`.
    """
    loss, share = by_loss(losses), by_saliency(wanted, held)
    influence = share.influence / np.maximum(share.goodness, np.finfo(np.float64).tiny)[:, None]
    influence[:, 1:] += loss.influence
    return Probed(goodness("both", -loss.goodness, share.goodness), influence)


def prompt_losses(model: Model, nodes: Sequence[NodeModel], tokens: Tokens, n_ctx: int) -> Floats:
    """Predict a prompt on the whole model and on all nodes, those of one model in the same batches.

    Args:
        model: the whole model.
        nodes: of `moeshard.placement.nodes`.
        tokens: int32 (T + 1,).
        n_ctx: tokens of the longest prompt to come: contexts are kept for the next one.

    Returns:
        float32 (1 + G, T): what each token but the first costs the whole model, and each node, nats.
    """
    found = np.empty((1 + len(nodes), tokens.size - 1), dtype=np.float32)
    for shared, own in by_model(model, nodes):
        step = max(1, LOGIT_BYTES // (len(own) * shared.n_vocab * 4))
        with shared.session(n_seq=len(own), n_ctx=n_ctx) as session:
            for seq, (_, keep) in enumerate(own):
                session.set_keep(keep, seq)
            for at in range(0, tokens.size - 1, step):
                inputs, targets = tokens[:-1][at : at + step], tokens[1:][at : at + step]
                logits = session.decode(dict.fromkeys(range(len(own)), inputs), "all")
                for seq, (index, _) in enumerate(own):
                    found[0 if index is None else 1 + index, at : at + step] = token_losses(logits[seq], targets)
    return found


def saliency(model: Model, keeps: Sequence[Keep], tokens: Tokens) -> tuple[Doubles, Doubles]:
    """Trace a prompt through the whole model; return `wanted` and `held` of `by_saliency`."""
    trace = model.trace(tokens, norms=True)
    values = trace.contributions()
    for layer, ids, own in zip(trace.layers, trace.ids, values, strict=True):
        check_finite(model.path, layer, np.unique(ids[~np.isfinite(own)]))
    layers = np.array(trace.layers)[:, None, None]
    # Layers with fewer experts per token are padded with id -1, of weight 0.
    held = [np.where(np.asarray(keep)[layers, trace.ids], values, 0).sum(axis=2) for keep in keeps]
    return values.sum(axis=2), np.stack(held)


def saliency_held(model: Model, keeps: Sequence[Keep], prompts: Sequence[Tokens]) -> Doubles:
    """Return float64 (G, S): the share of each prompt's saliency that each keep holds, mean over layers.

    What `by_saliency` finds for one prompt, for many at once: summed in the core, in shared batches.
    """
    layers = model.computed_layers
    held = np.stack([np.asarray(keep)[layers] for keep in keeps]).astype(np.float64)
    found = np.empty((len(keeps), len(prompts)))
    per_batch = max(1, 1024 // max(len(prompt) for prompt in prompts))
    with model.session(n_seq=per_batch, n_ctx=max(len(prompt) for prompt in prompts)) as session:
        for at in range(0, len(prompts), per_batch):
            batch = prompts[at : at + per_batch]
            session.reset()
            saliency = session.measure(dict(enumerate(batch)), layers, pairs=False).saliency[: len(batch)]
            for row, layer in enumerate(layers):
                check_finite(model.path, layer, np.flatnonzero(~np.isfinite(saliency[:, row]).all(axis=0)))
            share = saliency / np.maximum(saliency.sum(axis=2, keepdims=True), 1e-30)
            found[:, at : at + len(batch)] = np.einsum("gme,sme->gs", held, share) / len(layers)
    return found
