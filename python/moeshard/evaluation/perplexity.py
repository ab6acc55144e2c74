"""How well a model predicts a text, all experts or some: teacher-forced perplexity over independent windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError

if TYPE_CHECKING:
    from moeshard.keep.text import KeepSpec
    from moeshard.runtime.model import Model

Window = npt.NDArray[np.int32]


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


def text_windows(tokens: npt.ArrayLike, size: int = 256, count: int | None = None) -> list[Window]:
    """Cut a text into windows that can be scored independently.

    Args:
        tokens: integer ids ``(n,)``.
        size: tokens predicted per window.
        count: at most so many, evenly spread over the text (its beginning may be unlike the rest); None: all that fit.

    Returns:
        int32 arrays ``(size + 1,)``: every token but the first is predicted. Neighbours share one token, so that no
        token is predicted twice.

    Raises:
        MoeshardError: the text is shorter than one window.
    """
    array = np.asarray(tokens, dtype=np.int32)
    fitting = (array.size - 1) // size
    if size < 1 or fitting < 1:
        raise MoeshardError(f"a text of {array.size} tokens is too short for a window that predicts {size}")
    number = fitting if count is None else max(1, min(count, fitting))
    return [array[i * size : (i + 1) * size + 1] for i in (k * fitting // number for k in range(number))]


def score(
    model: Model,
    windows: Iterable[Window],
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
        total += Score(_nll(logits, window[1:]), window.size - 1, time.perf_counter() - start)
        if progress is not None:
            progress()
    return total


def _nll(logits: npt.NDArray[np.float32], targets: Window) -> float:
    """Sum of -log softmax(logits)[target] over rows; logits ``(n, n_vocab)``, targets ``(n,)``."""
    peak = logits.max(axis=1)
    spread = np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(targets.size), targets]
    return float((np.log(spread) + peak - chosen).sum())
