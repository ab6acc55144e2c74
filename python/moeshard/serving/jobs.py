"""Requests in the engine, and the lanes in which they are computed together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import moeshard._core as _core
from moeshard.keep.text import Keep
from moeshard.serving.ahead import Ahead
from moeshard.serving.errors import ApiError, failed
from moeshard.serving.fair import FairQueue
from moeshard.serving.steps import step_queue

MAX_SECONDS = 0.5
"""The thread looks at its clock at least so often."""


class Job:
    """A request in the engine, seen from the event loop."""

    def __init__(self, lane: Lane, options: dict[str, Any], seconds: float, cancel: Callable[[Job], None]):
        self.lane, self.options, self.seconds = lane, options, seconds
        self.deadline = time.monotonic() + seconds
        self.id = -1
        """Its number in the batcher, while it is computed."""
        self.ended = False
        """No more will come; set in the event loop."""
        self.counted_in = lane.jobs
        """Those among whom it is; of the event loop."""
        self.scope: str = options.get("scope", "")
        """Who asks: those who wait are served by turns."""
        self._updates: deque[_core.Progress | ApiError] = deque()
        self._news = asyncio.Event()
        self._tell_engine = cancel

    def add(self, update: _core.Progress | ApiError) -> None:
        """Take what came of a step; called in the event loop."""
        self._updates.append(update)
        if isinstance(update, ApiError) or update.over:
            self.ended = True
            self.counted_in.discard(self)
        self._news.set()

    async def steps(self) -> AsyncGenerator[list[_core.Progress], None]:
        """Yield what came since the last time, until the request is over; closing this cancels it.

        Raises:
            ApiError: it failed.
        """
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                found: list[_core.Progress] = []
                while self._updates:
                    update = self._updates.popleft()
                    if isinstance(update, ApiError) or update.error:
                        if found:  # what came before is told
                            yield found
                        raise update if isinstance(update, ApiError) else failed(update.error)
                    found.append(update)
                yield found
                if found[-1].over:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request, if it is not over: within a step nothing of it is computed any more."""
        if not self.ended:
            self.ended = True
            self.counted_in.discard(self)
            self._tell_engine(self)


@dataclass(frozen=True)
class Moved:
    """A request that goes on elsewhere."""

    job: Job
    source: Lane
    old: int
    """Its number there."""
    lane: Lane
    number: int
    ahead: Ahead


@dataclass(frozen=True)
class Move:
    """A request that is wanted elsewhere."""

    job: Job
    lane: Lane
    keep: Keep | None
    done: asyncio.Future[bool]


class Lane:
    """Requests that are computed in one batch."""

    def __init__(self, make: Callable[[], _core.Batcher], n_waiting: int):
        """Begin with what `make` makes; `n_waiting` requests may wait for one of its slots."""
        self._make, self.n_waiting = make, n_waiting
        self.batcher = make()
        self.n_slots, self.n_ctx = self.batcher.n_slots, self.batcher.n_ctx
        self.jobs: set[Job] = set()
        """All that are not over; of the event loop."""
        self.n_held = 0
        """Tokens that the slots remember, a moment ago."""
        self.steps = step_queue(self.batcher)
        self.computed: dict[int, Job | Ahead] = {}
        """Whose steps may be in the queue, by number."""
        # Of the engine's thread:
        self.waiting: FairQueue[Job] = FairQueue()
        self.running: dict[int, Job] = {}

    def run(self, n_steps: int) -> list[int]:
        """Make so many steps (0: any number), fewer where a request is over; return whose are."""
        return self.steps.run(self.batcher, n_steps, MAX_SECONDS)

    @property
    def is_lost(self) -> bool:
        """Whether the process that computed is gone, and another may be begun."""
        return bool(getattr(self.batcher, "lost", False))  # of a process of its own

    def clear(self) -> list[Job]:
        """Forget all requests, and return them; what came of them may still be in the queue."""
        left = [*self.waiting, *self.running.values()]
        self.waiting, self.running = FairQueue(), {}
        return left

    def renew(self, wake_fd: int) -> None:
        """Compute anew, with nothing left of what was lost.

        Raises:
            MoeshardError: that cannot be done now.
        """
        self.batcher = self._make()
        self.steps, self.computed = step_queue(self.batcher, wake_fd), {}
