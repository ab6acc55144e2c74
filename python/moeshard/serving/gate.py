"""A bound on what a node is asked at once, with a small queue before it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from moeshard.serving.errors import ApiError, busy, timed_out
from moeshard.serving.fair import FairQueue, gives_way


class Gate:
    """Lets so many through at once as a node has slots; others wait, owners by turns."""

    def __init__(self, n_waiting: int):
        """`n_waiting` requests may wait."""
        self.n_slots = 1
        """How many may be inside; changes when the node says so."""
        self.running = 0
        self._n_waiting = n_waiting
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._owners: dict[asyncio.Future[None], str] = {}  # in the order in which they came

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def inside(self, owner: str, seconds: float) -> AsyncIterator[None]:
        """Be one of those inside, when it is the owner's turn.

        Raises:
            ApiError: too many wait already, the turn did not come within some seconds, or `refuse_all` was called.
        """
        if self.running < self.n_slots and not self._queue:
            self.running += 1
        else:
            await self._wait(owner, seconds)
        try:
            yield
        finally:
            self.running -= 1
            self._admit()

    def resize(self, n_slots: int) -> None:
        """Take note of how many slots the node has."""
        self.n_slots = n_slots
        self._admit()

    def refuse_all(self, error: ApiError) -> None:
        """Let nobody wait any more who waits now."""
        while self._queue:
            turn = self._queue.pop()
            if not turn.done():
                turn.set_exception(error)

    async def _wait(self, owner: str, seconds: float) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if len(self._queue) >= self._n_waiting:
            self._make_room(owner)
        self._queue.add(owner, turn)
        self._owners[turn] = owner
        try:
            await asyncio.wait({turn}, timeout=seconds)
            if not turn.done():
                raise timed_out(seconds)
            turn.result()
        except asyncio.CancelledError:
            if turn.done() and turn.exception() is None:
                self.running -= 1  # its turn had just come
                self._admit()
            raise
        finally:
            del self._owners[turn]
            self._queue.remove(owner, turn)

    def _make_room(self, owner: str) -> None:
        full = busy(max(1, self._n_waiting // (4 * self.n_slots)))
        waiting = {turn: other for turn, other in self._owners.items() if not turn.done()}
        greedy = gives_way(Counter(waiting.values()), owner)
        if greedy is None:
            raise full
        newest = [turn for turn, other in waiting.items() if other == greedy][-1]
        self._queue.remove(greedy, newest)
        newest.set_exception(full)

    def _admit(self) -> None:
        while self._queue and self.running < self.n_slots:
            turn = self._queue.pop()
            if not turn.done():
                self.running += 1
                turn.set_result(None)
