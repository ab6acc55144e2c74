"""Deciding which node should have a session, from what was measured of its prompt. Pure functions: no model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Doubles
from moeshard.placement.probes import PROBES, Probed, by_both, by_loss, by_saliency

BOTH, LOSS, SALIENCY = PROBES

MIN_QUALITY = 0.5
"""Of the best node, on the prompt: the whole model's perplexity over its own."""
MIN_CAPTURED = 0.4
"""Of the best node: share of the prompt's saliency. On the embedded model, nodes that hold less lose about what
`MIN_QUALITY` allows."""
MIN_TOKENS = 16
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
    """``both``, ``loss`` or ``saliency``."""
    scores: dict[str, float]
    """Of each node, by name. ``loss``: what predicting the prompt costs it, nats (lower is better); ``saliency``: share
    that it holds of what the whole model's router wants for the prompt, 0 to 1 (higher is better); ``both``: its fit,
    that share times the perplexity of the whole model over its own, 0 to 1 (higher is better)."""
    full: float
    """The same of the whole model: its loss, or 1."""
    excess: dict[str, float] | None
    """What predicting the prompt costs each node over the whole model, nats; None where that was not computed."""
    captured: dict[str, float] | None
    """Share that each node holds of what the whole model's router wants for the prompt; None where none was traced."""
    best: str
    """The node of the best score, refused or not."""
    quality: float
    """What refusals go by. ``loss``: perplexity of the whole model over that of the best node, on the prompt, 1 where
    nothing is lost; ``saliency``: the share that the best node holds; ``both``: its fit."""
    margin: float | None
    """By how much the best is ahead of the second, in the unit of scores, for ``both`` in that of their logarithm; None
    where there is one node."""
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
    own, whole = _check_losses(names, losses, full)
    mean = float(whole.mean())
    scores = own.mean(axis=1)
    return _decide(
        LOSS,
        names,
        by_loss(own),
        scores,
        mean,
        np.exp(mean - scores),
        excess=scores - mean,
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
    """Decide by what the whole model's router wanted for a prompt; for the arrays see `by_saliency`.

    Raises:
        MoeshardError: shapes that do not fit.
    """
    total, part = _check_saliency(names, wanted, held)
    probed = by_saliency(total, part)
    return _decide(
        SALIENCY,
        names,
        probed,
        probed.goodness,
        1.0,
        probed.goodness,
        captured=probed.goodness,
        least=min_captured,
        n_tokens=total.shape[1],
        min_tokens=min_tokens,
        n_cut=n_cut,
    )


def place_by_both(
    names: Sequence[str],
    losses: npt.ArrayLike,
    full: npt.ArrayLike,
    wanted: npt.ArrayLike,
    held: npt.ArrayLike,
    *,
    min_fit: float = MIN_QUALITY * MIN_CAPTURED,
    min_tokens: int = MIN_TOKENS,
    n_cut: int = 0,
) -> Placed:
    """Decide by losses and saliency together; arrays as for `place_by_loss` and `place_by_saliency`, of one prompt.

    Raises:
        MoeshardError: shapes that do not fit, or losses that are not finite.
    """
    own, whole = _check_losses(names, losses, full)
    total, part = _check_saliency(names, wanted, held)
    if total.shape[1] != whole.size + 1:
        raise MoeshardError(
            f"losses of {whole.size} tokens and saliency of {total.shape[1]} do not fit: one token more has saliency"
        )
    probed = by_both(own, total, part)
    excess = own.mean(axis=1) - whole.mean()
    fit = np.exp(float(whole.mean()) + probed.goodness)
    return _decide(
        BOTH,
        names,
        probed,
        fit,
        1.0,
        fit,
        excess=excess,
        captured=by_saliency(total, part).goodness,
        least=min_fit,
        n_tokens=total.shape[1],
        min_tokens=min_tokens,
        n_cut=n_cut,
    )


def _check_losses(names: Sequence[str], losses: npt.ArrayLike, full: npt.ArrayLike) -> tuple[Doubles, Doubles]:
    own, whole = np.asarray(losses, dtype=np.float64), np.asarray(full, dtype=np.float64)
    if own.ndim != 2 or not own.size or own.shape != (len(names), whole.size):
        raise MoeshardError(
            f"{len(names)} nodes and losses of shape {own.shape} and {whole.shape} do not fit: (nodes, tokens) and "
            f"(tokens,) are needed"
        )
    if not (np.isfinite(own).all() and np.isfinite(whole).all()):
        raise MoeshardError("losses must be finite")
    return own, whole


def _check_saliency(names: Sequence[str], wanted: npt.ArrayLike, held: npt.ArrayLike) -> tuple[Doubles, Doubles]:
    total, part = np.asarray(wanted, dtype=np.float64), np.asarray(held, dtype=np.float64)
    if total.ndim != 2 or not part.size or part.shape != (len(names), *total.shape):
        raise MoeshardError(
            f"{len(names)} nodes and saliency of shape {total.shape} and {part.shape} do not fit: (layers, tokens) and "
            f"(nodes, layers, tokens) are needed"
        )
    return total, part


def _decide(
    probe: str,
    names: Sequence[str],
    probed: Probed,
    scores: npt.NDArray[np.float64],
    full: float,
    quality: npt.NDArray[np.float64],
    *,
    excess: Doubles | None = None,
    captured: Doubles | None = None,
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
        units: dict[str, str] = {LOSS: "nats per token", SALIENCY: "of the saliency", BOTH: "in the logarithm"}
        reason = f"{what}; {names[order[1]]} is {margin:.3f} ± {error or 0:.3f} {units[probe]} behind"
    return Placed(
        node=None if refused else names[best],
        index=None if refused else best,
        probe=probe,
        scores=_by_name(names, scores),
        full=full,
        excess=None if excess is None else _by_name(names, excess),
        captured=None if captured is None else _by_name(names, captured),
        best=names[best],
        quality=float(quality[best]),
        margin=margin,
        error=error,
        candidates=[] if refused else [names[best], *(names[i] for i in close)],
        reason=reason + "use the whole model" if refused else reason,
        n_tokens=n_tokens,
        n_cut=n_cut,
    )


def _by_name(names: Sequence[str], values: Doubles) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _describe(probe: str, name: str, quality: float) -> str:
    if probe == LOSS:
        times = 1 / quality if quality else np.inf
        return f"{name} predicts the prompt best, with a quality of {quality:.2f} (perplexity x {times:.2f})"
    if probe == BOTH:
        return f"{name} fits the prompt best, with {quality:.2f} (share captured x quality)"
    return f"{name} holds most of what the prompt wants, {quality:.2f} of its saliency"
