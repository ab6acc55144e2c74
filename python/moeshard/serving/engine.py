"""The thread that computes: it takes requests from the event loop, steps them, and gives back what came of each step.

Requests lie in lanes, a `Batcher` each. Lanes with something to do are stepped in turn, so that none waits for another
longer than for one step of it. The thread needs Python only where requests begin or end: what comes of steps lies in a
queue until the event loop has time for it, and neither waits for the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.serving.errors import ApiError, busy, failed, invalid, timed_out, unavailable

_log = logging.getLogger("moeshard.serving")

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
        self._updates: deque[_core.Progress | ApiError] = deque()
        self._news = asyncio.Event()
        self._tell_engine = cancel

    def add(self, update: _core.Progress | ApiError) -> None:
        """Take what came of a step; called in the event loop."""
        self._updates.append(update)
        if isinstance(update, ApiError) or update.over:
            self.ended = True
            self.lane.jobs.discard(self)
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
            self.lane.jobs.discard(self)
            self._tell_engine(self)


class Lane:
    """Requests that are computed in one batch."""

    def __init__(self, batcher: _core.Batcher, n_waiting: int):
        """`n_waiting` requests may wait for one of the batcher's slots."""
        self.batcher, self.n_waiting = batcher, n_waiting
        self.n_slots, self.n_ctx = batcher.n_slots, batcher.n_ctx
        self.jobs: set[Job] = set()
        """All that are not over; of the event loop."""
        self.n_held = 0
        """Tokens that the slots remember, a moment ago."""
        self.steps = _core.StepQueue()
        self.computed: dict[int, Job] = {}
        """Whose steps may be in the queue, by number."""
        # Of the engine's thread:
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}

    def run(self, n_steps: int) -> list[int]:
        """Make so many steps (0: any number), fewer where a request is over; return whose are."""
        return self.steps.run(self.batcher, n_steps, MAX_SECONDS)


def _wake_fds() -> tuple[int, int]:
    """Return descriptors to read from and to write to, which do not block.

    An eventfd where there is one: Linux wakes the reader of a pipe on the processor of its writer, who is to go on.
    """
    if sys.platform == "linux":
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return fd, fd
    ends = os.pipe()
    for fd in ends:
        os.set_blocking(fd, False)
    return ends


class Engine:
    """A thread and its lanes."""

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes = list(lanes)
        self.fault: str | None = "the engine has not been started"
        """Why nothing is computed; None where all is well."""
        self._commands: list[tuple[bool, Job]] = []
        self._wake = threading.Condition()
        self._closing = self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._wake_fds: tuple[int, int] | None = None
        """What is read from and written to when steps have come."""

    def start(self) -> None:
        """Begin to compute for the running event loop; more than once is once."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._wake_fds = _wake_fds()
            for lane in self.lanes:
                lane.steps = _core.StepQueue(self._wake_fds[1])
            self._loop.add_reader(self._wake_fds[0], self._collect)
            self._thread = threading.Thread(target=self._run, name="moeshard-engine", daemon=True)
            self.fault = None
            self._thread.start()

    async def stop(self) -> None:
        """End all requests, and the thread."""
        if self._thread is None:
            return
        self.fault = "the server is shutting down"
        with self._wake:
            self._closing = True
            self._call()
        while self._thread.is_alive():
            for lane in self.lanes:
                lane.batcher.abort()
            await asyncio.to_thread(self._thread.join, 0.05)
        if self._loop is not None and self._wake_fds is not None:
            self._collect()
            self._loop.remove_reader(self._wake_fds[0])
            for fd in set(self._wake_fds):
                os.close(fd)
            self._wake_fds = None

    def _collect(self) -> None:
        """Hand out what came of steps; called in the event loop."""
        if self._wake_fds is None:
            return
        with suppress(BlockingIOError):
            os.read(self._wake_fds[0], 4096)
        for lane in self.lanes:
            for step in lane.steps.take():
                job = lane.computed.get(step.id)
                if step.over:
                    lane.computed.pop(step.id, None)
                if job is not None and not job.ended:
                    job.add(step)

    def submit(self, lane: Lane, seconds: float, **options: Any) -> Job:
        """Hand a request to a lane; called in the event loop.

        Args:
            lane: one of this engine's.
            seconds: after so many it fails, wherever it is then.
            options: of `Batcher.submit`.

        Raises:
            ApiError: too many are waiting already, or the engine does not run.
        """
        if self.fault is not None:
            raise unavailable(self.fault)
        if len(lane.jobs) >= lane.n_slots + lane.n_waiting:
            raise busy(max(1, lane.n_waiting // (4 * lane.n_slots)))
        job = Job(lane, options, seconds, lambda job: self._send(False, job))
        lane.jobs.add(job)
        self._send(True, job)
        return job

    def _send(self, new: bool, job: Job) -> None:
        with self._wake:
            ended = self._ended
            if not ended:
                self._commands.append((new, job))
                self._call()
        if ended and new:
            job.add(unavailable(self.fault or "the engine has ended"))

    def _call(self) -> None:
        """Let the thread look at its commands after the step that it is in; called with the lock."""
        self._wake.notify()
        for lane in self.lanes:
            lane.steps.interrupt()

    # In the engine's thread.

    def _run(self) -> None:
        reason = "the server is shutting down"
        try:
            while not self._closing:
                self._take_commands()
                for lane in self.lanes:
                    self._expire(lane)
                    self._admit(lane)
                    if lane.running:
                        self._step(lane, alone=not any(other.running for other in self.lanes if other is not lane))
        except Exception as error:
            _log.exception("the engine failed; restart the server")
            self.fault = reason = f"the engine failed: {error}"
        with self._wake:
            self._ended = True
            commands, self._commands = self._commands, []
        over = {job for new, job in commands if new}
        for lane in self.lanes:
            over |= {*lane.waiting, *lane.running.values()}
        self._deliver([(job, failed(reason) if not self._closing else unavailable(reason)) for job in over])

    def _take_commands(self) -> None:
        with self._wake:
            while not (self._commands or self._closing or any(lane.running or lane.waiting for lane in self.lanes)):
                self._wake.wait()
            commands, self._commands = self._commands, []
        for new, job in commands:
            if new:
                job.lane.waiting.append(job)
            else:
                self._drop(job)

    def _drop(self, job: Job) -> None:
        if job.id >= 0:
            job.lane.batcher.cancel(job.id)
            job.lane.running.pop(job.id, None)
            job.lane.computed.pop(job.id, None)
        elif job in job.lane.waiting:
            job.lane.waiting.remove(job)

    def _expire(self, lane: Lane) -> None:
        now = time.monotonic()
        late = [job for job in (*lane.waiting, *lane.running.values()) if job.deadline < now]
        for job in late:
            self._drop(job)
        self._deliver([(job, timed_out(job.seconds)) for job in late])

    def _admit(self, lane: Lane) -> None:
        refused: list[tuple[Job, ApiError]] = []
        while lane.waiting and lane.batcher.n_free:
            job = lane.waiting.popleft()
            try:
                job.id = lane.batcher.submit(**job.options)
            except MoeshardError as error:
                refused.append((job, invalid(f"{error}")))
            except Exception as error:  # of this request alone
                _log.exception("a request could not be begun")
                refused.append((job, failed(f"The request could not be begun: {error}")))
            else:
                lane.running[job.id] = lane.computed[job.id] = job
        self._deliver(refused)

    def _step(self, lane: Lane, alone: bool) -> None:
        """Make a step, or, where no other lane has anything to do, as many as there are until a request is over."""
        for number in lane.run(0 if alone else 1):
            lane.running.pop(number, None)
        lane.n_held = lane.batcher.n_held

    def _deliver(self, found: Sequence[tuple[Job, ApiError]]) -> None:
        """Let the event loop know, once for all."""
        if not found:
            return
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._hand_out, found)
        except RuntimeError:
            _log.debug("the event loop ended before the engine did")

    def _hand_out(self, found: Sequence[tuple[Job, ApiError]]) -> None:
        self._collect()  # what came before
        for job, error in found:
            if not job.ended:
                job.add(error)
