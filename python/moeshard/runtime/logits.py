"""Arithmetic on logits."""

from __future__ import annotations

import numpy as np

from moeshard.arrays import Floats, Tokens

LOGIT_BYTES = 256 << 20
"""Logits held at once."""


def log_sum_exp(logits: Floats) -> Floats:
    """Return float32 (n,) of logits (n, n_vocab)."""
    peak = logits.max(axis=1)
    norm: Floats = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
    return norm


def token_losses(logits: Floats, targets: Tokens, norm: Floats | None = None) -> Floats:
    """Return float32 (n,): negative log-likelihood of each target (n,) under logits (n, n_vocab), nats.

    `norm` is what `log_sum_exp` found, where it is known.
    """
    losses: Floats = (log_sum_exp(logits) if norm is None else norm) - logits[np.arange(targets.size), targets]
    return losses
