"""Steps of batchers, on their way from the engine's thread to the event loop."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

import moeshard._core as _core


class Wake:
    """Descriptors through which one thread wakes another that waits for several things."""

    def __init__(self) -> None:
        """Open them.

        Where there is one it is an eventfd: Linux wakes the reader of a pipe on the processor of its writer, who is to
        go on.
        """
        if sys.platform == "linux":
            self.read_fd = self.write_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return
        self.read_fd, self.write_fd = os.pipe()
        for fd in (self.read_fd, self.write_fd):
            os.set_blocking(fd, False)

    def clear(self) -> None:
        """Take note of having been woken."""
        with suppress(BlockingIOError):
            os.read(self.read_fd, 4096)

    def close(self) -> None:
        """Close them."""
        for fd in {self.read_fd, self.write_fd}:
            os.close(fd)


class RemoteSteps:
    """What `_core.StepQueue` is to the batchers of this process, for those of another one."""

    def __init__(self, wake_fd: int = -1):
        self._wake_fd = wake_fd
        self._lock = threading.Lock()
        self._interrupted = threading.Event()
        self._steps: list[_core.Progress] = []

    def run(self, batcher: _core.Batcher, n_steps: int = 0, seconds: float = 1.0) -> list[int]:
        """Step until a request is over, or none is left, or so many steps, or seconds, are over, or it is interrupted.

        Returns the numbers of requests that are over.
        """
        end = time.monotonic() + seconds
        n = 0
        while True:
            steps = batcher.step()
            n += 1
            over = [step.id for step in steps if step.over]
            if steps:
                self._put(steps)
            if over or not steps or n == n_steps or self._interrupted.is_set() or time.monotonic() >= end:
                self._interrupted.clear()
                return over

    def interrupt(self) -> None:
        """End `run` after the step that it is in; one that has not begun, after its first."""
        self._interrupted.set()

    def take(self) -> list[_core.Progress]:
        """Return all that came since the last time."""
        with self._lock:
            steps, self._steps = self._steps, []
        return steps

    def _put(self, steps: list[_core.Progress]) -> None:
        with self._lock:
            was_empty = not self._steps
            self._steps += steps
        if was_empty and self._wake_fd >= 0:
            with suppress(BlockingIOError):  # then the reader is going to be woken anyway
                os.write(self._wake_fd, (1).to_bytes(8, sys.byteorder))


def step_queue(batcher: _core.Batcher, wake_fd: int = -1) -> _core.StepQueue | RemoteSteps:
    """Return what carries the steps of a batcher; who reads `wake_fd` is woken when there are some."""
    return _core.StepQueue(wake_fd) if isinstance(batcher, _core.Batcher) else RemoteSteps(wake_fd)
