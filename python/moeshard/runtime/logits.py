"""Arithmetic on logits."""

from __future__ import annotations

import numpy as np

from moeshard.arrays import Doubles, Floats, Tokens

LOGIT_BYTES = 256 << 20
"""Logits held at once."""


def log_sum_exp(logits: Floats) -> Doubles:
    """Return float64 (n,) of logits (n, n_vocab)."""
    peak = logits.max(axis=1)
    norm: Doubles = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64))
    return norm


def token_losses(logits: Floats, targets: Tokens, norm: Doubles | None = None) -> Doubles:
    """Return float64 (n,): negative log-likelihood of each target (n,) under logits (n, n_vocab), nats.

    `norm` is what `log_sum_exp` found, where it is known.
    """
    losses: Doubles = (log_sum_exp(logits) if norm is None else norm) - logits[np.arange(targets.size), targets]
    return losses
