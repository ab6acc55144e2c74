"""The thread that computes: it takes requests from the event loop, steps them, and gives back what came of each step.

Requests lie in lanes, a `Batcher` each. Lanes with something to do are stepped in turn, so that none waits for another
longer than for one step of it. The thread needs Python only where requests begin or end: what comes of steps lies in a
queue until the event loop has time for it, and neither waits for the other.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from moeshard._core import MoeshardError
from moeshard.keep.text import Keep
from moeshard.serving.ahead import Ahead
from moeshard.serving.errors import ApiError, busy, failed, invalid, timed_out, unavailable
from moeshard.serving.fair import gives_way
from moeshard.serving.jobs import Job, Lane, Move, Moved
from moeshard.serving.steps import Wake, step_queue

_log = logging.getLogger("moeshard.serving")

_T = TypeVar("_T")

RETRY_SECONDS = 5.0
"""Where a process was lost, how long until another is begun."""


class Engine:
    """A thread and its lanes."""

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes = list(lanes)
        self.fault: str | None = "the engine has not been started"
        """Why nothing is computed; None where all is well."""
        self._commands: list[tuple[bool, Job]] = []
        self._moves: list[Move] = []
        self._wake = threading.Condition()
        self._closing = self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._news: Wake | None = None
        """Called when steps have come."""

    def start(self) -> None:
        """Begin to compute for the running event loop; more than once is once."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._news = Wake()
            for lane in self.lanes:
                lane.steps = step_queue(lane.batcher, self._news.write_fd)
            self._loop.add_reader(self._news.read_fd, self._collect)
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
        if self._loop is not None and self._news is not None:
            self._collect()
            self._loop.remove_reader(self._news.read_fd)
            self._news.close()
            self._news = None

    def _collect(self) -> None:
        """Hand out what came of steps; called in the event loop."""
        if self._news is None:
            return
        self._news.clear()
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
        job = Job(lane, options, seconds, lambda job: self._send(False, job))
        if len(lane.jobs) >= lane.n_slots + lane.n_waiting:
            self._make_room(job)
        lane.jobs.add(job)
        self._send(True, job)
        return job

    def _make_room(self, job: Job) -> None:
        """Let the newest request of who has most of a full queue give way, if the new one's owner has less."""
        lane = job.lane
        full = busy(max(1, lane.n_waiting // (4 * lane.n_slots)))
        waiting = [other for other in lane.jobs if other.id < 0]
        greedy = gives_way(Counter(other.scope for other in waiting), job.scope)
        if greedy is None:
            raise full
        newest = max((other for other in waiting if other.scope == greedy), key=lambda other: other.deadline)
        newest.add(full)
        self._send(False, newest)

    async def move(self, job: Job, lane: Lane, keep: Keep | None) -> bool:
        """Compute a request under another keep, maybe in another lane, from its next token on.

        Returns whether it was done; where not, it goes on as it was, or is over.
        """
        move = Move(job, lane, keep, asyncio.get_running_loop().create_future())
        with self._wake:
            if self._ended:
                return False
            self._moves.append(move)
            self._wake.notify()
            for other in self.lanes:
                other.steps.interrupt()
        return await move.done

    def _settle(self, told: tuple[Move, Moved | None]) -> None:
        """Take note that a request was moved, or not; called in the event loop."""
        move, moved = told
        self._collect()  # what came before
        if moved is not None:
            job = moved.job
            moved.source.computed.pop(moved.old, None)
            if moved.lane.computed.get(moved.number) is moved.ahead:
                moved.lane.computed[moved.number] = job
            if not job.ended:
                job.counted_in.discard(job)
                job.counted_in = moved.lane.jobs
                job.counted_in.add(job)
            for step in moved.ahead.steps:
                if not job.ended:
                    job.add(step)
        if not move.done.done():
            move.done.set_result(moved is not None)

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
        while not self._closing:
            reason = self._compute()
            self._end_all(reason)
            if reason and not self._renew():
                break
        with self._wake:
            self._ended = True
        self._end_all(self.fault or "")

    def _compute(self) -> str:
        """Compute until the engine is to end; or fails, and return why."""
        try:
            while not self._closing:
                self._take_commands()
                for lane in self.lanes:
                    self._expire(lane)
                    self._admit(lane)
                    if lane.running:
                        self._step(lane, alone=not any(other.running for other in self.lanes if other is not lane))
        except Exception as error:
            _log.exception("the engine failed")
            self.fault = f"the engine failed: {error}"
            return self.fault
        return ""

    def _end_all(self, reason: str) -> None:
        """Let everybody know that nothing more comes."""
        with self._wake:
            commands, self._commands = self._commands, []
            moves, self._moves = self._moves, []
        for move in moves:
            self._tell(self._settle, (move, None))
        over = {job for new, job in commands if new}
        for lane in self.lanes:
            over.update(lane.clear())
        error = unavailable("the server is shutting down") if self._closing else failed(reason)
        self._deliver([(job, error) for job in over])

    def _renew(self) -> bool:
        """Where a process was lost, try to begin another until that is done; False: there is none, or the end came."""
        assert self._news is not None
        while any(lane.is_lost for lane in self.lanes):
            with self._wake:
                if self._closing or self._wake.wait_for(lambda: self._closing, RETRY_SECONDS):
                    return False
            try:
                for lane in self.lanes:
                    lane.renew(self._news.write_fd)
            except MoeshardError as error:
                self.fault = f"the engine failed: {error}"
                continue
            _log.warning("the engine computes again")
            self.fault = None
            return True
        return False

    def _take_commands(self) -> None:
        with self._wake:
            while not self._has_work():
                self._wake.wait()
            commands, self._commands = self._commands, []
            moves, self._moves = self._moves, []
        for new, job in commands:
            if new:
                job.lane.waiting.add(job.scope, job)
            else:
                self._drop(job)

        for move in moves:
            self._tell(self._settle, (move, self._move(move.job, move.lane, move.keep)))

    def _has_work(self) -> bool:
        told = bool(self._commands or self._moves or self._closing)
        return told or any(lane.running or lane.waiting for lane in self.lanes)

    def _move(self, job: Job, lane: Lane, keep: Keep | None) -> Moved | None:
        source, old = job.lane, job.id
        if source.running.get(old) is not job:
            return None
        try:
            number = source.batcher.move(old, lane.batcher, keep)
        except MoeshardError as error:
            _log.info("a request stays where it is: %s", error)
            return None
        del source.running[old]
        moved = Moved(job, source, old, lane, number, Ahead())
        lane.running[number], lane.computed[number] = job, moved.ahead
        job.lane, job.id = lane, number
        return moved

    def _drop(self, job: Job) -> None:
        if job.id >= 0:
            job.lane.batcher.cancel(job.id)
            job.lane.running.pop(job.id, None)
            job.lane.computed.pop(job.id, None)
        else:
            job.lane.waiting.remove(job.scope, job)

    def _expire(self, lane: Lane) -> None:
        now = time.monotonic()
        late = [job for job in (*lane.waiting, *lane.running.values()) if job.deadline < now]
        for job in late:
            self._drop(job)
        self._deliver([(job, timed_out(job.seconds)) for job in late])

    def _admit(self, lane: Lane) -> None:
        refused: list[tuple[Job, ApiError]] = []
        while lane.waiting and lane.batcher.n_free:
            job = lane.waiting.pop()
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
        if found:
            self._tell(self._hand_out, found)

    def _tell(self, what: Callable[[_T], None], told: _T) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what, told)
        except RuntimeError:
            _log.debug("the event loop ended before the engine did")

    def _hand_out(self, found: Sequence[tuple[Job, ApiError]]) -> None:
        self._collect()  # what came before
        for job, error in found:
            if not job.ended:
                job.add(error)
