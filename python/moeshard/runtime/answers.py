"""Answers that a model writes itself, many in one batch, each with its own prompt, keep and seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.arrays import Tokens
from moeshard.keep.text import Keep

if TYPE_CHECKING:
    from moeshard.runtime.model import Model


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

    def params(self, seed: int) -> _core.SamplingParams:
        """Return what the core draws by."""
        return _core.SamplingParams(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=seed
        )


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
    """Let the model answer prompts, up to `BATCH` at a time: where one ends, the next begins.

    Args:
        model: what writes.
        requests: prompts, seeds and keeps.
        n_tokens: of each answer; where the model ends one itself it is shorter.
        sampling: see `Sampling`.
        progress: called with the number of answers that a step has finished; what it raises ends the work.

    Returns:
        int32 (n,) for each request. The same requests in the same order give the same answers. In another order they
        are drawn by the same chances, but batches of other sizes round otherwise.

    Raises:
        MoeshardError: a prompt is empty, or a keep does not fit the model.
    """
    if any(request.prompt.size == 0 for request in requests):
        raise MoeshardError("a prompt is empty: an answer needs at least one token to start from")
    if not requests:
        return []
    n_ctx = max(request.prompt.size for request in requests) + n_tokens
    batcher = model.batcher(min(BATCH, len(requests)), n_ctx)
    sampling = sampling or Sampling()
    answers: list[list[int]] = [[] for _ in requests]
    running: dict[int, int] = {}  # the request behind each of the batcher's numbers
    waiting = deque(enumerate(requests))
    while waiting or running:
        while waiting and batcher.n_free:
            index, request = waiting.popleft()
            number = batcher.submit(
                request.prompt, keep=request.keep, max_tokens=n_tokens, sampling=sampling.params(request.seed)
            )
            running[number] = index
        ended = 0
        for step in batcher.step():
            if step.error:
                raise MoeshardError(step.error)
            if step.token >= 0 and step.stop_reason != "end":
                answers[running[step.id]].append(step.token)
            if step.over:
                del running[step.id]
                ended += 1
        if ended and progress is not None:
            progress(ended)
    return [np.array(answer, dtype=np.int32) for answer in answers]
