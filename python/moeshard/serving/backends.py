"""Who answers: one node, or the whole model. Whatever it is, it is asked and answers like this."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moeshard.arrays import Tokens
from moeshard.serving.decision import Decision
from moeshard.serving.protocol import Options, Prompt

FULL = "full"
"""The name of the backend that holds everything."""

Finish = Literal["stop", "length"]


class Watch(Protocol):
    """What a backend that can move an answer tells about it, and asks where it belongs."""

    target: Decision | None
    """Where the answer belongs now; None: where it is."""

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""

    def begin(self, prompt: Tokens) -> None:
        """Take the prompt."""

    def add(self, token: int | None, missed: Sequence[float]) -> None:
        """Take what tokens missed, and the token of the answer that came of them; None while the prompt is read."""

    def arrived(self) -> None:
        """The answer is where `target` says."""

    def refused(self) -> None:
        """The answer could not be moved and goes on where it is."""

    def end(self) -> None:
        """The answer is over."""


@dataclass(frozen=True)
class Ask:
    """One prompt to be answered once."""

    prompt: Prompt
    options: Options
    scope: str = ""
    """What is remembered of a prompt serves requests of the same scope only: who asks, not a secret."""
    watch: Watch | None = None
    """Says whether the answer is to be moved; who cannot do that does not ask it."""
    begun: str = ""
    """What of the answer is there already: it is continued, and only what comes after it is told."""


@dataclass(frozen=True)
class Scored:
    """A token and how likely it was."""

    token: int
    data: bytes
    """What it reads; a piece of a character, maybe."""
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[bytes, float], ...] = ()
    """The likeliest tokens in its place, best first."""


@dataclass(frozen=True)
class Event:
    """What came of an answer since the one before. The last one says why it ended; failures are raised."""

    text: str = ""
    n_prompt: int = 0
    """Tokens of the prompt."""
    n_cached: int = 0
    """Of them, those that were not computed again."""
    n_generated: int = 0
    """Tokens of the answer so far."""
    logprobs: tuple[Scored, ...] = ()
    """Of the answer's tokens."""
    prompt_logprobs: tuple[Scored, ...] = ()
    """Of the prompt's tokens, with `Options.echo` and log-probabilities: all of them before the first text."""
    prompt_text: str = ""
    """With `Options.echo`, in the first event: the prompt as text."""
    finish: Finish | None = None
    missed: float | None = None
    """Mean share missed so far, where the answer is now (docs/serving.md); None where everything is held."""


@dataclass(frozen=True)
class Load:
    """What a backend has to do."""

    running: int
    waiting: int
    slots: int
    """Requests that it computes at once."""

    @property
    def share(self) -> float:
        """Requests for each slot: 1 is full, more waits."""
        return (self.running + self.waiting) / max(self.slots, 1)


class Backend(Protocol):
    """Something that answers. All calls come from the event loop of the server."""

    @property
    def name(self) -> str:
        """Its name in the plan, or `FULL`."""

    @property
    def fault(self) -> str | None:
        """Why it cannot answer now; None where it can."""

    @property
    def load(self) -> Load:
        """What it has to do now."""

    @property
    def n_ctx(self) -> int:
        """Tokens that a prompt and its answer can have together; 0 where that is not known yet."""

    @property
    def memory_used(self) -> float | None:
        """Share of what its slots can hold, in tokens, that they remember, 1 is all; None where that is not known."""

    def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Answer. Closing the generator ends the computation within a step.

        Raises (from the generator):
            ApiError: the request is wrong (400), the queue is full (429), or the backend failed (500 and above: before
                the first event another backend may be asked instead).
        """

    async def start(self) -> None:
        """Make ready, in the event loop that will use it."""

    async def stop(self) -> None:
        """End what runs and give everything back."""
