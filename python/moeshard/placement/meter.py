"""When a session has to be looked at again: what its node makes it miss, added up against what is normal there.

The rule is Page's CUSUM. Each token adds what it missed beyond the node's `reference`, and takes away what it missed
less; the sum never falls below zero, and where it passes the node's `threshold` the session's latest text has to decide
once more. The sum left zero where the text changed, about: what came since is what decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Doubles
from moeshard.placement.decision import MIN_QUALITY, Placed, place_by_loss

FEWEST_TOKENS = 16
"""Of text that decides where a session goes on, so many at least."""
MOST_TOKENS = 128
"""And so many at most, the latest."""


@dataclass(frozen=True)
class Limits:
    """What is normal on a node; learned by `moeshard.evaluation.alarms`."""

    reference: float
    """Share of routing weight, from 0 to 1: above it a token speaks for a change."""
    threshold: float
    """The sum at which a session is looked at again."""


class Meter:
    """What one answer misses on one node."""

    def __init__(self, limits: Limits | None):
        """Without limits nothing is ever looked at again."""
        self._limits = limits
        self._sum = 0.0
        self._threshold = limits.threshold if limits is not None else float("inf")
        self._total = 0.0
        self.n = 0
        """Tokens so far."""
        self.n_since = 0
        """Tokens since the sum left zero."""

    @property
    def mean(self) -> float | None:
        """Mean share missed so far; None before the first token."""
        return self._total / self.n if self.n else None

    def add(self, missed: Iterable[float]) -> None:
        """Take what tokens missed, in their order."""
        for share in missed:
            self.n += 1
            self._total += share
            if self._limits is None:
                continue
            self._sum = max(0.0, self._sum + share - self._limits.reference)
            self.n_since = self.n_since + 1 if self._sum > 0 else 0

    @property
    def passed(self) -> bool:
        """Whether the session has to be looked at again."""
        return self._sum > self._threshold

    def stayed(self) -> None:
        """Begin anew: the session was looked at and stays. The next time twice as much is asked for."""
        self._sum, self.n_since = 0.0, 0
        self._threshold *= 2


def n_deciding(n_since: int) -> int:
    """Return how many latest tokens of a session decide where it goes on, by `Meter.n_since`."""
    return min(max(n_since, FEWEST_TOKENS), MOST_TOKENS)


def place_again(
    names: Sequence[str],
    losses: npt.ArrayLike,
    full: npt.ArrayLike,
    current: str,
    *,
    min_quality: float = MIN_QUALITY,
) -> Placed | None:
    """Say where a session goes on; None: it stays where it is, which is as good as any. A pure function.

    Args:
        names: of the nodes.
        losses: (G, T), nats: of the latest T tokens on each node.
        full: (T,): the same on the whole model.
        current: the node that it is on.
        min_quality: as of `place_by_loss`.
    """
    placed = place_by_loss(names, losses, full, min_quality=min_quality, min_tokens=0)
    return None if current in placed.candidates else placed


def evidence(missed: npt.ArrayLike, reference: float) -> Doubles:
    """Return (…, T): the sum after each of T tokens, of `Meter`, if nothing were ever looked at."""
    steps = np.cumsum(np.asarray(missed, dtype=np.float64) - reference, axis=-1)
    lowest = np.minimum(np.minimum.accumulate(steps, axis=-1), 0)
    return steps - lowest
