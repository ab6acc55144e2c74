"""How well a model predicts a text, all experts or some: teacher-forced perplexity over independent windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeshard.arrays import Tokens
from moeshard.runtime.logits import token_losses

if TYPE_CHECKING:
    from moeshard.keep.text import KeepSpec
    from moeshard.runtime.model import Model


@dataclass(frozen=True)
class Score:
    """What predicting some text cost."""

    nll: float
    """Negative log-likelihood of all scored tokens together, in nats."""
    n_tokens: int
    """Scored tokens."""
    seconds: float
    """Time of computing the logits."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; inf where that overflows."""
        mean = self.nll / self.n_tokens
        return math.exp(mean) if mean < 709 else math.inf

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds if self.seconds else 0.0

    def __add__(self, other: Score) -> Score:
        return Score(self.nll + other.nll, self.n_tokens + other.n_tokens, self.seconds + other.seconds)


def score(
    model: Model,
    windows: Iterable[Tokens],
    keep: KeepSpec | None = None,
    *,
    progress: Callable[[], None] | None = None,
) -> Score:
    """Score windows of `text_windows` with the experts of `keep` (None: all of them).

    `progress` is called after each window. Raises MoeshardError where the keep does not fit the model.
    """
    total = Score(0.0, 0, 0.0)
    for window in windows:
        start = time.perf_counter()
        logits = model.logits(window[:-1], keep)
        total += Score(float(token_losses(logits, window[1:]).sum()), window.size - 1, time.perf_counter() - start)
        if progress is not None:
            progress()
    return total
