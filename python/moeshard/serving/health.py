"""Whether a node can be asked: polled within a bound, and judged by how requests to it end."""

from __future__ import annotations

import time

from moeshard.serving.node_errors import NodeError

FAILURES = 3
"""So many requests in a row that a node fails open its circuit, though it says that it is well."""
COOL_SECONDS = 5.0
"""How long it then is not asked; twice as long every time that it fails again."""
MAX_COOL_SECONDS = 60.0
SILENT_POLLS = 2
"""A node that lets so many polls in a row without an answer is down; with one more its requests are given up."""


class Health:
    """What is known of one node. Times are those of `time.monotonic`."""

    def __init__(self, name: str):
        self.name = name
        self._poll_fault: str | None = "it has not been asked yet"
        self._silent = 0
        self._failures = 0
        self._cool = COOL_SECONDS
        self._closed_until = 0.0
        self._last_failure = ""

    @property
    def fault(self) -> str | None:
        """Why it is not asked; None where it can be."""
        if self._poll_fault is not None:
            return self._poll_fault
        left = self._closed_until - time.monotonic()
        if left > 0:
            return f"{self._failures} requests in a row failed, it is asked again in {left:.0f} s: {self._last_failure}"
        return None

    @property
    def is_silent(self) -> bool:
        """Whether it let the last poll without an answer."""
        return self._silent > 0

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be hoped for from requests that it is computing."""
        return self._silent > SILENT_POLLS

    def well(self) -> None:
        """It answered a poll."""
        self._poll_fault, self._silent = None, 0

    def ill(self, why: str) -> None:
        """It answered a poll, or was found, not to be able to answer."""
        self._poll_fault, self._silent = why, 0

    def silent(self, why: str) -> None:
        """It did not answer a poll in time: a moment's business is forgiven."""
        self._silent += 1
        if self._silent >= SILENT_POLLS or self._poll_fault is not None:
            self._poll_fault = why

    def served(self) -> None:
        """It answered a request."""
        self._failures, self._cool = 0, COOL_SECONDS

    def failed(self, error: NodeError) -> None:
        """It failed a request."""
        self._last_failure = error.message
        if error.cause == "connect":
            self.ill(error.message)  # until a poll finds it again
            return
        if error.cause not in ("cut", "timeout", "answer"):
            return  # it said so itself: a request may be to blame, and polls tell the rest
        self._failures += 1
        if self._failures >= FAILURES:
            self._closed_until = time.monotonic() + self._cool
            self._cool = min(2 * self._cool, MAX_COOL_SECONDS)
