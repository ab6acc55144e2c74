"""Who answers a session, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reason = Literal["placed", "unclear", "refused", "short", "hashed", "forced", "only", "down", "unable", "moved"]


@dataclass(frozen=True)
class Decision:
    """Who answers, and why."""

    backend: str
    reason: Reason
    detail: str
    """For people, a sentence."""
    fit: float | None
    """Perplexity of the whole model over the backend's own, on the first turn, at most 1; None where it was not
    measured."""
