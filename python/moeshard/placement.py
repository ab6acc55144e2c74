"""Which node should have this session: decided by one prefill of its prompt; docs/placing.md tells the whole story."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.embedded import resolve_model
from moeshard.model import Model
from moeshard.nodes import plan_nodes
from moeshard.plan import Plan, read_plan
from moeshard.probing import Probed, Tokens, by_loss, by_saliency, prompt_losses, saliency
from moeshard.session import as_tokens

LOSS, SALIENCY = "loss", "saliency"
PROBES = (LOSS, SALIENCY)

MIN_QUALITY = 0.5
"""Of the best node, on the prompt: the whole model's perplexity over its own."""
MIN_CAPTURED = 0.4
"""Of the best node: share of the prompt's saliency. On the embedded model, nodes that hold less lose about what
`MIN_QUALITY` allows."""
MIN_TOKENS = 16
MAX_TOKENS = 512
TIE_ERRORS = 2.0
"""A node that is behind the best by less than so many standard errors is too close to call."""

# Batches of other sizes sum in another order: a node that holds everything may seem to lose this much.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Placed:
    """Where a session belongs, and why. Nats are per token of the prompt."""

    node: str | None
    """Name of the node; None where none is good enough: the whole model should have the session."""
    index: int | None
    """Its place in the plan."""
    probe: str
    """``loss`` or ``saliency``."""
    scores: dict[str, float]
    """Of each node, by name. ``loss``: what predicting the prompt costs it, nats (lower is better); ``saliency``: share
    that it holds of what the whole model's router wants for the prompt, 0 to 1 (higher is better)."""
    full: float
    """The same of the whole model: its loss, or 1."""
    best: str
    """The node of the best score, refused or not."""
    quality: float
    """What refusals go by. ``loss``: perplexity of the whole model over that of the best node, on the prompt, 1 where
    nothing is lost; ``saliency``: the share that the best node holds."""
    margin: float | None
    """By how much the best is ahead of the second, in the unit of scores; None where there is one node."""
    error: float | None
    """Standard error of `margin` over the tokens, paired; None where there is one node, or one token."""
    candidates: list[str]
    """The best and, in order, all others that are good enough and too close to it to call: any of them may be chosen,
    for its load say. Empty where the session is refused."""
    reason: str
    """For people, in a sentence."""
    n_tokens: int
    """Tokens of the prompt that were looked at: its last ones."""
    n_cut: int
    """Tokens before them that were not."""

    @property
    def clear(self) -> bool:
        """Whether the best node is better than the second by more than chance explains."""
        if self.margin is None:
            return True
        return self.error is not None and self.margin > TIE_ERRORS * self.error

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object of all fields and `clear`."""
        return {**vars(self), "clear": self.clear}


class Placement:
    """Places sessions on the nodes of a plan. Safe to use from several threads.

    The whole model runs the prompt; nodes are masks on it, none needs to exist. Where nodes run by themselves they can
    measure the losses, and `place_by_loss` decides.
    """

    def __init__(
        self,
        plan: Plan | str | os.PathLike[str],
        model: Model | str | os.PathLike[str] | None = None,
        *,
        min_quality: float = MIN_QUALITY,
        min_captured: float = MIN_CAPTURED,
        min_tokens: int = MIN_TOKENS,
        max_tokens: int = MAX_TOKENS,
        n_threads: int = 0,
        n_gpu_layers: int = -1,
    ):
        """Make ready to place.

        Args:
            plan: the nodes, or the file that describes them.
            model: the whole model, loaded or a file; None: the file that the plan names.
            min_quality: probe ``loss`` refuses a session whose prompt the best node predicts with a perplexity above
                the whole model's divided by this, that is with more than ``-log(min_quality)`` nats per token over it.
                0 never refuses, 1 accepts no loss.
            min_captured: probe ``saliency`` refuses a session of whose prompt's saliency the best node holds less.
            min_tokens: a prompt of fewer is refused: it says too little.
            max_tokens: of a longer prompt the last so many are looked at, those nearest to the answer.
            n_threads, n_gpu_layers: as for `moeshard.Model`, where `model` is not loaded yet.

        Raises:
            MoeshardError: plan or model cannot be read, the plan is of another model or names none, or a limit is out
                of range.
        """
        for name, value in (("min_quality", min_quality), ("min_captured", min_captured)):
            if not 0 <= value <= 1:
                raise MoeshardError(f"{name} must be between 0 and 1, got {value}")
        if not 2 <= min_tokens <= max_tokens:
            raise MoeshardError(
                f"min_tokens must be at least 2 and at most max_tokens, got {min_tokens} and {max_tokens}"
            )
        self.plan = plan if isinstance(plan, Plan) else read_plan(plan)
        if not isinstance(model, Model):
            path = planned_model(self.plan) if model is None else model
            model = Model(path, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
        self.model = model
        self.min_quality, self.min_captured = min_quality, min_captured
        self.min_tokens, self.max_tokens = min_tokens, max_tokens
        self._nodes = plan_nodes(model, self.plan)

    @property
    def names(self) -> list[str]:
        """The names of the nodes, in the order of the plan."""
        return [node.name for node in self.plan.nodes]

    def place(self, prompt: str | Tokens | Sequence[int], probe: str = LOSS) -> Placed:
        """Say which node should have the session of a prompt.

        Args:
            prompt: text, control tokens in it being read as such (`moeshard.Model.chat_prompt` makes it of messages);
                or token ids.
            probe: ``loss``: the node that predicts the prompt itself best, all nodes being computed, in one batch;
                ``saliency``: the one that holds most of what the whole model's router wants for it, which takes one
                prefill however many nodes there are.

        Raises:
            MoeshardError: an unknown probe, an empty prompt, for ``loss`` one of a single token, or tokens that the
                model does not have.
        """
        if probe not in PROBES:
            raise MoeshardError(f"unknown probe '{probe}'; choose {' or '.join(PROBES)}")
        tokens = self.model.tokenize(prompt, parse=True) if isinstance(prompt, str) else as_tokens(prompt)
        if not tokens.size:
            raise MoeshardError("the prompt is empty: there is nothing to place a session by")
        seen = tokens[-self.max_tokens :]
        limits = {"min_tokens": self.min_tokens, "n_cut": tokens.size - seen.size}
        if probe == SALIENCY:
            wanted, held = saliency(self.model, [node.keep for node in self.plan.nodes], seen)
            return place_by_saliency(self.names, wanted, held, min_captured=self.min_captured, **limits)
        if seen.size < 2:
            raise MoeshardError("the prompt is one token: none follows that could be predicted; use probe 'saliency'")
        losses = prompt_losses(self.model, self._nodes, seen, self.max_tokens)
        return place_by_loss(self.names, losses[1:], losses[0], min_quality=self.min_quality, **limits)

    def place_many(self, prompts: Sequence[str | Tokens | Sequence[int]], probe: str = LOSS) -> list[Placed]:
        """Place several sessions, one after the other; see `place`."""
        return [self.place(prompt, probe) for prompt in prompts]


def planned_model(plan: Plan) -> Path:
    """Return the path of the model that a plan file names.

    Raises:
        MoeshardError: it names none, or none is there.
    """
    name = plan.model.facts.get("path")
    if not isinstance(name, str):
        raise MoeshardError("the plan does not say where its model is (model.path): name the model too")
    path = resolve_model(name)
    if not path.is_file():
        raise MoeshardError(f"the model that the plan names is not there: '{name}': name the model too")
    return path


def place_by_loss(
    names: Sequence[str],
    losses: npt.ArrayLike,
    full: npt.ArrayLike,
    *,
    min_quality: float = MIN_QUALITY,
    min_tokens: int = MIN_TOKENS,
    n_cut: int = 0,
) -> Placed:
    """Decide by what predicting the prompt cost. A pure function: nodes can measure their own losses.

    Args:
        names: of the nodes.
        losses: (G, T): negative log-likelihood of each token of the prompt but the first on each node, nats.
        full: (T,): the same on the whole model.
        min_quality, min_tokens: see `Placement`.
        n_cut: tokens before these, for the record.

    Raises:
        MoeshardError: shapes that do not fit, or losses that are not finite.
    """
    own, whole = np.asarray(losses, dtype=np.float64), np.asarray(full, dtype=np.float64)
    if own.ndim != 2 or not own.size or own.shape != (len(names), whole.size):
        raise MoeshardError(
            f"{len(names)} nodes and losses of shape {own.shape} and {whole.shape} do not fit: (nodes, tokens) and "
            f"(tokens,) are needed"
        )
    if not (np.isfinite(own).all() and np.isfinite(whole).all()):
        raise MoeshardError("losses must be finite")
    mean = float(whole.mean())
    scores = own.mean(axis=1)
    return _decide(
        LOSS,
        names,
        by_loss(own),
        scores,
        mean,
        np.exp(mean - scores),
        least=min_quality,
        n_tokens=whole.size + 1,
        min_tokens=min_tokens,
        n_cut=n_cut,
    )


def place_by_saliency(
    names: Sequence[str],
    wanted: npt.ArrayLike,
    held: npt.ArrayLike,
    *,
    min_captured: float = MIN_CAPTURED,
    min_tokens: int = MIN_TOKENS,
    n_cut: int = 0,
) -> Placed:
    """Decide by what the whole model's router wanted for a prompt; see `moeshard.probing.by_saliency` for the arrays.

    Raises:
        MoeshardError: shapes that do not fit.
    """
    total, part = np.asarray(wanted, dtype=np.float64), np.asarray(held, dtype=np.float64)
    if total.ndim != 2 or not part.size or part.shape != (len(names), *total.shape):
        raise MoeshardError(
            f"{len(names)} nodes and saliency of shape {total.shape} and {part.shape} do not fit: (layers, tokens) and "
            f"(nodes, layers, tokens) are needed"
        )
    probed = by_saliency(total, part)
    return _decide(
        SALIENCY,
        names,
        probed,
        probed.goodness,
        1.0,
        probed.goodness,
        least=min_captured,
        n_tokens=total.shape[1],
        min_tokens=min_tokens,
        n_cut=n_cut,
    )


def _decide(
    probe: str,
    names: Sequence[str],
    probed: Probed,
    scores: npt.NDArray[np.float64],
    full: float,
    quality: npt.NDArray[np.float64],
    *,
    least: float,
    n_tokens: int,
    min_tokens: int,
    n_cut: int,
) -> Placed:
    good = quality >= least - _ROUNDING
    order = np.argsort(-probed.goodness, kind="stable")
    best = int(order[0])
    errors = probed.errors(best)
    behind = probed.goodness[best] - probed.goodness
    close = [int(i) for i in order[1:] if good[i] and not behind[i] > TIE_ERRORS * errors[i]]
    margin = error = None
    if order.size > 1:
        second = int(order[1])
        margin = float(behind[second])
        error = float(errors[second]) if np.isfinite(errors[second]) else None
    what = _describe(probe, names[best], float(quality[best]))
    refused = n_tokens < min_tokens or not good[best]
    if n_tokens < min_tokens:
        reason = f"the prompt has {n_tokens} tokens, fewer than the {min_tokens} that tell where it belongs; "
    elif refused:
        reason = f"no node is good enough: {what}, and at least {least:.2f} is wanted; "
    elif close:
        reason = f"{what}; too close to call: {', '.join(names[i] for i in close)}"
    elif margin is None:
        reason = f"{what}; there is no other node"
    else:
        unit = "nats per token" if probe == LOSS else "of the saliency"
        reason = f"{what}; {names[order[1]]} is {margin:.3f} ± {error or 0:.3f} {unit} behind"
    return Placed(
        node=None if refused else names[best],
        index=None if refused else best,
        probe=probe,
        scores={name: float(score) for name, score in zip(names, scores, strict=True)},
        full=full,
        best=names[best],
        quality=float(quality[best]),
        margin=margin,
        error=error,
        candidates=[] if refused else [names[best], *(names[i] for i in close)],
        reason=reason + "use the whole model" if refused else reason,
        n_tokens=n_tokens,
        n_cut=n_cut,
    )


def _describe(probe: str, name: str, quality: float) -> str:
    if probe == LOSS:
        times = 1 / quality if quality else np.inf
        return f"{name} predicts the prompt best, with a quality of {quality:.2f} (perplexity x {times:.2f})"
    return f"{name} holds most of what the prompt wants, {quality:.2f} of its saliency"
