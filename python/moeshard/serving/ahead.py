"""What came of a request that was moved before all that came before the move was handed out."""

from __future__ import annotations

import moeshard._core as _core


class Ahead:
    """Steps of a request that was moved, until those that were made before it have been handed out."""

    def __init__(self) -> None:
        self.ended = False
        self.steps: list[_core.Progress] = []

    def add(self, step: _core.Progress) -> None:
        """Take a step."""
        self.steps.append(step)
