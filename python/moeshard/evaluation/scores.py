"""What losses amount to: means over domains, with intervals over windows.

Every figure is a mean over the domains, each counting alike, of the mean over its windows. Intervals are Student's, see
`moeshard.profile.intervals`. Those of a difference are of the windows' own differences: what makes a window hard for
both sides cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Doubles, Ints
from moeshard.evaluation.losses import Losses
from moeshard.files.documents import expect, take
from moeshard.profile.intervals import CONFIDENCE, FEWEST, estimate

Interval = tuple[float, float]

_LARGEST = 700.0
"""exp of more is no float."""


def exp(nats: float) -> float:
    """Return e to the power of `nats`, at most 1e304: JSON has no infinity."""
    return math.exp(min(nats, _LARGEST))


@dataclass(frozen=True)
class Agreement:
    """How near predictions are to the whole model's, over the tokens after the prompt."""

    kl: float
    """Mean Kullback-Leibler divergence from the whole model, nats."""
    kl_ci: Interval
    kl_p99: float
    """Its 99th percentile over tokens."""
    top1: float
    """Share of tokens for which both find the same token likeliest."""
    top1_ci: Interval


@dataclass(frozen=True)
class Scores:
    """What some way of serving the text costs, after the prompts."""

    nll: float
    """Negative log-likelihood, nats per token."""
    nll_ci: Interval
    excess: float
    """`nll` over that of the whole model."""
    excess_ci: Interval
    agreement: Agreement | None
    """None for the whole model itself."""
    domains: dict[str, Scores] = field(default_factory=dict)
    """The same of each domain alone."""

    @property
    def perplexity(self) -> float:
        return exp(self.nll)

    @property
    def ratio(self) -> float:
        """Perplexity relative to the whole model's."""
        return exp(self.excess)

    @property
    def ratio_ci(self) -> Interval:
        return exp(self.excess_ci[0]), exp(self.excess_ci[1])

    @property
    def quality(self) -> float:
        """Perplexity of the whole model relative to this: 1 where nothing is lost."""
        return exp(-self.excess)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `scores_from_json` reads; docs/evaluation.md says what it holds."""
        found: dict[str, Any] = {
            "nll": self.nll,
            "nll_ci": list(self.nll_ci),
            "perplexity": self.perplexity,
            "excess": self.excess,
            "excess_ci": list(self.excess_ci),
        }
        if self.agreement is not None:
            found |= {"ratio": self.ratio, "ratio_ci": list(self.ratio_ci)}
            found |= {
                key: list(value) if isinstance(value, tuple) else value for key, value in vars(self.agreement).items()
            }
        if self.domains:
            found["domains"] = {name: scores.to_json() for name, scores in self.domains.items()}
        return found


def scores_from_json(value: dict[str, Any], where: str) -> Scores:
    """Read what `Scores.to_json` wrote; `where` is the object's place in its file.

    Raises:
        MoeshardError: naming the place of what is missing or of another type.
    """
    agreement = None
    if "kl" in value:
        agreement = Agreement(
            take(value, "kl", float, where),
            interval(value, "kl_ci", where),
            take(value, "kl_p99", float, where),
            take(value, "top1", float, where),
            interval(value, "top1_ci", where),
        )
    domains = take(value, "domains", dict, where) if "domains" in value else {}
    return Scores(
        take(value, "nll", float, where),
        interval(value, "nll_ci", where),
        take(value, "excess", float, where),
        interval(value, "excess_ci", where),
        agreement,
        {
            name: scores_from_json(expect(own, dict, f"{where}.domains.{name}"), f"{where}.domains.{name}")
            for name, own in domains.items()
        },
    )


def interval(source: dict[str, Any], key: str, where: str) -> Interval:
    """Return an interval ``[low, high]`` of an object, or say what is wrong with it."""
    values = [expect(value, float, f"{where}.{key}") for value in take(source, key, list, where)]
    if len(values) != 2 or values[0] > values[1]:
        raise MoeshardError(f"{where}.{key}: expected [low, high], got {values}")
    return values[0], values[1]


def check_windows(domains: Sequence[str], owners: npt.ArrayLike, window: int) -> None:
    """Raise a `MoeshardError` where a domain has too few windows for an interval.

    Args:
        domains: their names.
        owners: (S,): the index of each window's domain.
        window: tokens predicted in each.
    """
    for name, number in zip(domains, np.bincount(owners, minlength=len(domains)), strict=True):
        if number < FEWEST:
            raise MoeshardError(
                f"text '{name}' has {number} {'window' if number == 1 else 'windows'} of {window + 1} tokens, but an "
                f"interval needs {FEWEST} or more; give more text, or a smaller window"
            )


class Scorer:
    """Scores of one set of `Losses`."""

    def __init__(self, losses: Losses, *, confidence: float = CONFIDENCE) -> None:
        """Look at losses.

        Args:
            losses: of `moeshard.evaluation.losses.measure_losses`.
            confidence: of intervals, above 0 and below 1.

        Raises:
            MoeshardError: a domain has too few windows for an interval, or the confidence is out of range.
        """
        if not 0 < confidence < 1:
            raise MoeshardError(f"confidence must be above 0 and below 1: {confidence}")
        self.losses = losses
        self._confidence = confidence
        self._rows = [np.flatnonzero(losses.domain == index) for index in range(len(losses.domains))]
        check_windows(losses.domains, losses.domain, losses.full.shape[1])
        self._full = losses.full_loss()
        self._groups = losses.group_losses()

    def full(self) -> Scores:
        """Return the scores of the whole model."""
        return self._scores(self._full, None)

    def group(self, index: int) -> Scores:
        """Return the scores of all windows under one keep."""
        return self._mean_of([np.full(self._full.size, index)])

    def hashed(self) -> Scores:
        """Return the mean over keeps: what sessions cost that are sent to any node."""
        return self._mean_of([np.full(self._full.size, index) for index in range(len(self._groups))])

    def placed(self, node: Ints) -> Scores:
        """Return the scores of each session on its node (S,)."""
        return self._mean_of([node])

    def estimate(self, values: Doubles) -> tuple[float, Interval]:
        """Return the mean of any value per window (S,), and its interval: of a difference of losses, say."""
        return self.losses.mean(values), self._interval(values)

    def regret(self, node: Ints) -> tuple[float, Interval]:
        """Return what sessions on nodes (S,) lose over the best node of each, nats per token, and its interval."""
        values = self.losses.placed_losses(node) - self._groups.min(axis=0)
        return self.losses.mean(values), self._interval(values, least=0)

    def right(self, node: Ints) -> float:
        """Return the share of sessions whose node (S,) none is better than."""
        return self.losses.mean((self.losses.placed_losses(node) <= self._groups.min(axis=0)).astype(np.float64))

    def _mean_of(self, placements: list[Ints]) -> Scores:
        """Scores of the mean over several ways of placing all windows."""
        window = np.arange(self._full.size)
        nll = np.mean([self._groups[node, window] for node in placements], axis=0)
        after = self.losses.after
        kl = [self.losses.kl[node, window, after] for node in placements]
        same = [self.losses.same[node, window, after] for node in placements]
        return self._scores(nll, (kl, same))

    def _scores(
        self,
        nll: Doubles,
        tokens: tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.bool_]]] | None,
        domain: int | None = None,
    ) -> Scores:
        """Scores over all domains, each with its own inside, or those of one domain.

        `nll` is (S,); of `tokens`, each array is (S, tokens after the prompt).
        """
        agreement = None
        if tokens is not None:
            kl = np.mean([part.mean(axis=1, dtype=np.float64) for part in tokens[0]], axis=0)
            same = np.mean([part.mean(axis=1) for part in tokens[1]], axis=0)
            peak = float(np.mean([self._percentile(part, 0.99, domain) for part in tokens[0]]))
            agreement = Agreement(
                *(self._mean(kl, domain), self._interval(kl, domain, least=0), peak),
                *(self._mean(same, domain), self._interval(same, domain, least=0, most=1)),
            )
        excess = nll - self._full
        inside = enumerate(self.losses.domains) if domain is None else ()
        return Scores(
            *(self._mean(nll, domain), self._interval(nll, domain)),
            *(self._mean(excess, domain), self._interval(excess, domain)),
            agreement,
            {name: self._scores(nll, tokens, index) for index, name in inside},
        )

    def _mean(self, values: Doubles, domain: int | None) -> float:
        return self.losses.mean(values) if domain is None else float(values[self._rows[domain]].mean())

    def _interval(
        self, values: Doubles, domain: int | None = None, *, least: float = -math.inf, most: float = math.inf
    ) -> Interval:
        """Where the mean of values (S,) is, which cannot be less than `least` or more than `most`."""
        rows = self._rows if domain is None else [self._rows[domain]]
        low, high = estimate(values, rows).interval(self._confidence)
        return max(float(low), least), min(float(high), most)

    def _percentile(self, values: npt.NDArray[np.float32], part: float, domain: int | None) -> float:
        """Smallest value (S, n) that so large a part does not exceed, domains counting alike."""
        rows = self._rows if domain is None else [self._rows[domain]]
        flat = np.concatenate([values[own].ravel() for own in rows])
        weight = np.concatenate([np.full(own.size * values.shape[1], 1 / own.size) for own in rows])
        order = flat.argsort()
        cumulative = weight[order].cumsum()
        return float(flat[order[np.searchsorted(cumulative, part * cumulative[-1] * (1 - 1e-12))]])
