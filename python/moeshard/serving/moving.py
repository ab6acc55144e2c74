"""The way out: a session whose node misses too much is placed again by its latest text, between two tokens.

While an answer is computed, what it misses is added up (`moeshard.placement.meter`). Where that passes what is normal
on its node, the latest text is predicted by all nodes and the whole model, as a first turn is; the answer goes on
meanwhile. If another node is clearly better, or none is good enough, the request is moved there with all that it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from moeshard.arrays import Tokens
from moeshard.placement.decision import Placed
from moeshard.placement.meter import MOST_TOKENS, Limits, Meter, n_deciding, place_again
from moeshard.serving.decision import Decision
from moeshard.serving.errors import ApiError
from moeshard.serving.placer import Losses, Placer, State, choose

_log = logging.getLogger("moeshard.serving")


@runtime_checkable
class LatestProber(Protocol):
    """A prober that can look at text as it stands, between two tokens."""

    async def latest(self, tokens: Tokens, n: int) -> Losses:
        """Predict the last `n` of these tokens on every node of the plan, in its order, and on the whole model."""


@dataclass(frozen=True)
class Ways:
    """What all answers of a server need to be moved."""

    placer: Placer
    prober: LatestProber
    limits: Mapping[str, Limits]
    """Of the nodes that have some; see `moeshard.evaluation.alarms`."""
    states: Callable[[], Mapping[str, State]]
    moved: Callable[[str, Decision], None]
    """Told where a session came from and where it goes."""


class Tally:
    """What an answer missed where it is, on the whole."""

    def __init__(self, n_known: int = 0):
        """Of what is computed first, so many tokens were looked at before: where the answer came from."""
        self._n_known, self._n, self._sum = n_known, 0, 0.0

    def add(self, missed: Sequence[float]) -> Sequence[float]:
        """Take what tokens missed, in their order, and return those of it that count."""
        counting = missed[self._n_known :]
        self._n_known -= len(missed) - len(counting)
        self._n += len(counting)
        self._sum += sum(counting)
        return counting

    @property
    def mean(self) -> float | None:
        """Mean share; None before the first token, and where everything is held."""
        return self._sum / self._n if self._n else None


class Watch:
    """One answer of a session that was placed. All calls come from the event loop."""

    def __init__(self, ways: Ways, key: str, decision: Decision):
        """Watch an answer of the session `key`, which `decision` placed."""
        self._ways, self._key, self.decision = ways, key, decision
        self._meter = Meter(ways.limits.get(decision.backend))
        self._tokens: list[int] = []
        self._missed: list[float] = []
        self._look: asyncio.Task[None] | None = None
        self._over = False
        self._placed: Placed | None = None
        self.target: Decision | None = None
        """Where the answer belongs now; None: where it is."""

    def begin(self, prompt: Tokens) -> None:
        """Take the prompt."""
        self._tokens = prompt.tolist()

    def add(self, token: int | None, missed: Sequence[float]) -> None:
        """Take what tokens missed, and the token of the answer that came of them; None while the prompt is read."""
        self._missed = [*self._missed, *missed]
        if token is None:
            return
        self._meter.add(self._missed[-MOST_TOKENS:])  # what lies far back in a prompt does not count
        self._missed = []
        self._tokens.append(token)
        if self._meter.passed and self._look is None and self.target is None:
            # The text as it is now: more may have been computed before anybody looks.
            tokens, n = np.array(self._tokens, dtype=np.int32), n_deciding(self._meter.n_since)
            self._look = asyncio.ensure_future(self._look_again(tokens, n))

    async def _look_again(self, tokens: Tokens, n: int) -> None:
        try:
            losses = await self._ways.prober.latest(tokens, n)
            self.target = self._judge(losses)
        except ApiError as error:
            _log.info("a session could not be looked at again: %s", error.message)
        self._look = None
        if self.target is None:
            self._meter.stayed()
        elif self._over:
            self.arrived()

    def _judge(self, losses: Losses) -> Decision | None:
        placer = self._ways.placer
        if losses.full is None or not losses.n_tokens:
            return None
        placed = place_again(
            placer.names, losses.nodes, losses.full, self.decision.backend, min_quality=placer.min_quality
        )
        if placed is None:
            return None
        self._placed = placed
        found = choose(placed, self._key, self._ways.states())
        return None if found.backend == self.decision.backend else replace(found, reason="moved")

    def arrived(self) -> None:
        """The answer is where `target` says: the session stays there."""
        assert self.target is not None
        self._ways.moved(self.decision.backend, self.target)
        assert self._placed is not None
        self._ways.placer.moved(self._key, self._placed, self.target)
        self.decision, self.target = self.target, None
        self._meter = Meter(self._ways.limits.get(self.decision.backend))

    def refused(self) -> None:
        """The answer could not be moved and goes on where it is."""
        self.target = None
        self._meter.stayed()

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer so far."""
        return self._tokens

    def end(self) -> None:
        """The answer is over. What is found out now is for the session's next turn."""
        self._over = True
        if self.target is not None:
            self.arrived()
