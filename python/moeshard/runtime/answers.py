"""Answers that a model writes itself, many in one batch, each with its own prompt, keep and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Tokens
from moeshard.keep.text import Keep

if TYPE_CHECKING:
    from moeshard.runtime.model import Model
    from moeshard.runtime.session import Session


BATCH = 16
"""Sequences at once: more are hardly faster, and take memory for their keys and values."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; meanings and defaults are those of `Model.generate`."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < np.inf and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise MoeshardError(
                f"{self}: temperature and top_k must not be negative, top_p be in (0, 1] and min_p in [0, 1]"
            )

    def draw(self, logits: npt.NDArray[np.floating], chances: npt.NDArray[np.float64]) -> Tokens:
        """Return int32 (n,): a token for each row of logits (n, n_vocab), by numbers (n,) from 0 to 1."""
        if self.temperature == 0:
            likeliest: Tokens = logits.argmax(axis=1).astype(np.int32)
            return likeliest
        n, n_vocab = logits.shape
        count = min(self.top_k or n_vocab, n_vocab)
        best = np.argpartition(-logits, count - 1, axis=1)[:, :count]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, axis=1), axis=1), axis=1)
        scores = np.take_along_axis(logits, best, axis=1).astype(np.float64)
        scores -= scores[:, :1]
        probs = np.exp(scores)
        # A token is dropped where those before it have this probability already, so the first one always stays.
        before = (probs.cumsum(axis=1) - probs) / probs.sum(axis=1, keepdims=True)
        probs = np.exp(scores / self.temperature) * ((before < self.top_p) & (probs >= self.min_p))
        reached = probs.cumsum(axis=1) > chances[:, None] * probs.sum(axis=1, keepdims=True)
        drawn: Tokens = best[np.arange(n), reached.argmax(axis=1)].astype(np.int32)
        return drawn


@dataclass(frozen=True, eq=False)
class Request:
    """An answer that is wanted."""

    prompt: Tokens
    seed: int
    keep: Keep | None = None
    """bool (n_layer, n_expert), or None for all experts."""


def write_answers(
    model: Model,
    requests: Sequence[Request],
    n_tokens: int,
    *,
    sampling: Sampling | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Tokens]:
    """Let the model answer prompts, up to `BATCH` at a time.

    Args:
        model: what writes.
        requests: prompts, seeds and keeps.
        n_tokens: of each answer; where the model ends one itself it is shorter.
        sampling: see `Sampling`.
        progress: called with the number of answers that a batch has finished; what it raises ends the work.

    Returns:
        int32 (n,) for each request. The same requests in the same order give the same answers. In another order they
        are drawn by the same chances, but batches of other sizes round otherwise.

    Raises:
        MoeshardError: a prompt is empty, or a keep does not fit the model.
    """
    if any(request.prompt.size == 0 for request in requests):
        raise MoeshardError("a prompt is empty: an answer needs at least one token to start from")
    answers: list[Tokens] = []
    n_ctx = max((request.prompt.size for request in requests), default=0) + n_tokens
    n_seq = min(BATCH, len(requests))
    for at in range(0, len(requests), BATCH):
        batch = requests[at : at + BATCH]
        with model.session(n_seq=n_seq, n_ctx=n_ctx) as session:
            answers += _write(model, session, batch, n_tokens, sampling or Sampling())
        if progress is not None:
            progress(len(batch))
    return answers


def _write(model: Model, session: Session, batch: Sequence[Request], n_tokens: int, sampling: Sampling) -> list[Tokens]:
    chances = [np.random.default_rng(request.seed) for request in batch]
    answers: list[list[int]] = [[] for _ in batch]
    for seq, request in enumerate(batch):
        session.set_keep(request.keep, seq)
    inputs = {seq: request.prompt for seq, request in enumerate(batch)}
    for _ in range(n_tokens):
        logits = session.decode(inputs, "last")
        drawn = sampling.draw(
            np.concatenate([logits[seq] for seq in inputs]), np.array([chances[seq].random() for seq in inputs])
        )
        running = [(seq, token) for seq, token in zip(inputs, drawn, strict=True) if not model.is_end(int(token))]
        for seq, token in running:
            answers[seq].append(int(token))
        inputs = {seq: np.array([token], dtype=np.int32) for seq, token in running}
        if not inputs:
            break
    return [np.array(answer, dtype=np.int32) for answer in answers]
