"""How far a mean of few sequences or windows may be from the truth: standard errors, and intervals by Student's t.

Text is sampled by sequences, which have nothing to do with each other; the tokens of one have much in common, so they
are never counted as independent. A figure is a mean over domains, all counting alike, of the mean over a domain's
sequences. Its variance is the sum of theirs, and because each of these is itself estimated, from few sequences, it is
Student's t, not the normal distribution, that says how wide an interval has to be; how many degrees of freedom it has
is after Welch and Satterthwaite (Biometrics Bulletin 2, 1946).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Doubles, Ints

FEWEST = 4
"""Sequences or windows of a domain, of fewer of which no interval is given: one is then several times as wide as what
it is about, and hangs on the distribution being a normal one."""
CONFIDENCE = 0.95
_STEPS = 20001
_NORMAL = 1e4
"""Degrees of freedom, of more of which the distribution differs from this one in no digit that is shown."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Means with what is known of their errors; arrays of one shape."""

    mean: Doubles
    error: Doubles
    """Standard errors; NaN where a domain has one sequence only, of which nothing can be told."""
    freedom: Doubles
    """Degrees of freedom of these."""

    def interval(self, confidence: float = CONFIDENCE) -> tuple[Doubles, Doubles]:
        """Return the lower and upper ends of intervals that hold the truth with this probability."""
        half = np.where(self.error > 0, self.error, 0)
        quantile = np.vectorize(lambda freedom: student_quantile((1 + confidence) / 2, freedom), otypes=[np.float64])
        width = np.where(np.isnan(self.error), np.nan, half * quantile(np.maximum(self.freedom, 1)))
        return self.mean - width, self.mean + width


def estimate(values: npt.NDArray[np.floating], rows: Sequence[Ints]) -> Estimate:
    """Estimate the mean over domains of the mean over each domain's sequences.

    Args:
        values: (S, …).
        rows: of each domain: indices of its sequences.
    """
    wide = values.astype(np.float64)
    means = [wide[own].mean(axis=0) for own in rows]
    parts = [_squared_error(wide[own]) for own in rows]
    variance: Doubles = np.sum(parts, axis=0) / len(rows) ** 2
    # Of no spread at all there is nothing to be wrong about; any number will do.
    squares = [part**2 / max(1, own.size - 1) for part, own in zip(parts, rows, strict=True)]
    denominator: Doubles = np.sum(squares, axis=0)
    freedom = np.divide(np.sum(parts, axis=0) ** 2, denominator, out=np.ones_like(denominator), where=denominator > 0)
    return Estimate(np.mean(means, axis=0), np.sqrt(variance), freedom)


def _squared_error(values: Doubles) -> Doubles:
    """Squared standard errors of the means of values (n, …) over the first axis; NaN where n is 1."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1:], np.nan)
    squared: Doubles = values.var(axis=0, ddof=1) / n
    return squared


def student_quantile(probability: float, freedom: float) -> float:
    """Return what a variable of Student's t with so many degrees of freedom, at least 1, is below with a probability.

    With t = sqrt(freedom) · tan(angle) the density is a power of the cosine, on a bounded range: it is added up there.
    Right to four digits.
    """
    freedom = min(freedom, _NORMAL)
    angle = np.linspace(-np.pi / 2, np.pi / 2, _STEPS)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(freedom) * np.tan(np.interp(probability * below[-1], below, angle)))
