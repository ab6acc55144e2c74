"""What a profile can be trusted to say: concentration, standard errors, and whether it ranks anything at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Doubles, Ints, Rows
from moeshard.keep.text import Keep
from moeshard.profile.intervals import FEWEST, estimate
from moeshard.profile.record import Profile

TOPS = (1, 32, 48, 64, 96)
"""Of how many best experts the share is shown, beside that of all."""
HALVINGS = 20
_BLOCK = 64
"""Sequences that are looked at at once, where there may be many."""

FLAT_SPREAD = 0.1
"""Experts whose true shares differ by less than this, relative to their mean, are alike for every purpose."""
RANKED_AGREEMENT = 0.7
"""Rank correlation of the profile with one of as much other text of the same kind, below which its order is chance."""
SUPER_EXPERT = 10.0
"""An expert whose largest output is so many times its layer's median is a super expert: dropping one ruins a model."""
SUPER_HITS = 4
"""Tokens that have to choose an expert before the size of its outputs says anything. Few: what makes super experts are
tokens such as the first one of a text."""


@dataclass(frozen=True)
class Verdict:
    """Whether experts can be ranked by a profile."""

    spread: float
    """Standard deviation of experts' shares over their mean, less what sampling alone explains; mean over layers."""
    agreement: float
    """Expected rank correlation with a second profile of as much traffic; mean over layers."""
    n_sequences: int
    n_tokens: int

    @property
    def is_known(self) -> bool:
        """Every domain has two sequences or more; of fewer nothing can be said, and both figures are NaN."""
        return not math.isnan(self.spread)

    @property
    def is_flat(self) -> bool:
        return self.spread < FLAT_SPREAD

    @property
    def is_too_small(self) -> bool:
        return not self.is_known or (not self.is_flat and self.agreement < RANKED_AGREEMENT)

    def __str__(self) -> str:
        """Say it in a sentence or two."""
        if not self.is_known:
            return (
                f"Whether experts differ is unknown: a domain has a single sequence, which does not say how far others "
                f"are from it. Measure more than these {self.n_tokens} tokens, or in shorter sequences (--window)."
            )
        if self.is_flat:
            return (
                f"The profile is flat: experts differ by {self.spread:.0%} of their mean, less than matters. For this "
                f"traffic no expert is worth more than another, and dropping any is as bad as dropping others."
            )
        if self.is_too_small:
            return (
                f"The sample is too small to rank experts: a second one of as much text would agree with a rank "
                f"correlation of {self.agreement:.2f} only. Measure more than these {self.n_tokens} tokens."
            )
        return (
            f"Experts differ by {self.spread:.0%} of their mean, and a second sample of as much text would rank them "
            f"alike (rank correlation {self.agreement:.2f})."
        )


def concentration(profile: Profile, tops: Sequence[int], what: str = "mass") -> Doubles:
    """Return float64 (M, len(tops)): the share of each layer's mass that its best 1, 32, … experts have."""
    values = np.sort(profile.total(what), axis=1)[:, ::-1]
    cumulative = np.cumsum(values, axis=1) / np.maximum(values.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    best: Doubles = cumulative[:, [min(top, profile.n_expert) - 1 for top in tops]]
    return best


def tops(n_expert: int) -> list[int]:
    """Return those of `TOPS` that say something where a layer has `n_expert` experts, and `n_expert` itself.

    Of few experts: one, a quarter, half and three quarters of them.
    """
    numbers = TOPS if n_expert >= 64 else (1, n_expert // 4, n_expert // 2, 3 * n_expert // 4)
    return sorted({top for top in numbers if 0 < top < n_expert} | {n_expert})


def summed_concentration(profile: Profile, tops: Sequence[int], what: str = "mass") -> Doubles:
    """Return float64 (len(tops),): the share that the best 1, 32, … ids have of the mass summed over layers by id.

    The older view of concentration, and a misleading one: experts of one id in two layers have nothing to do with each
    other, so the sums are nearly even however concentrated each layer is. It is also what a node holds of the mass that
    keeps these ids in every layer.
    """
    by_id = np.sort(shares(profile, what).mean(axis=0))[::-1]
    best: Doubles = np.cumsum(by_id)[[min(top, profile.n_expert) - 1 for top in tops]]
    return best


def mean_entropy(profile: Profile) -> Doubles:
    """Return float64 (M,): entropy of each layer's router, nats, mean over tokens; domains count alike."""
    measured = np.unique(profile.domain[profile.n_tokens > 0]).size
    entropy: Doubles = profile.total("entropy") / max(1, measured)
    return entropy


def shares(profile: Profile, what: str = "saliency", domains: Sequence[str] | None = None) -> Doubles:
    """Return float64 (M, E): each expert's share of its layer's sum over some domains, 0 to 1; domains count alike."""
    total = profile.total(what, domains)
    share: Doubles = total / np.maximum(total.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return share


def captured(profile: Profile, keep: Keep, domains: Sequence[str] | None = None) -> float:
    """Return the share of the saliency of some domains that a keep holds, mean over layers; 0 to 1."""
    return float((shares(profile, "saliency", domains) * keep[profile.layers]).sum(axis=1).mean())


def peak_ratios(profile: Profile) -> Doubles:
    """Return float64 (M, E): the norm of each expert's largest output, in medians of its layer; 0 for unused ones.

    The median is that of experts that were seen often enough, or of all that were seen at all where none was: an expert
    that no token chose has no outputs, and those of rare ones are small for want of chances to be large.
    """
    peak = profile.peak.max(axis=0).astype(np.float64)
    hits = profile.count.sum(axis=0, dtype=np.int64)
    ratios = np.zeros(peak.shape)
    for own, chosen, out in zip(peak, hits, ratios, strict=True):
        often = chosen >= SUPER_HITS if (chosen >= SUPER_HITS).any() else chosen > 0
        median = np.median(own[often]) if often.any() else 0.0
        if median > 0:
            np.divide(own, median, out=out, where=chosen > 0)
    return ratios


def super_experts(profile: Profile) -> Rows:
    """Return bool (M, E): experts with outputs far larger than any other's (arXiv 2507.23279).

    One that hardly any token chose is none: it may be a fluke, and a model does not hang on it.
    """
    often = profile.count.sum(axis=0, dtype=np.int64) >= SUPER_HITS
    found: Rows = often & (peak_ratios(profile) > SUPER_EXPERT)
    return found


def share_errors(profile: Profile, what: str = "saliency") -> Doubles:
    """Return float64 (M, E): standard errors of `shares`, over sequences within each domain; NaN: unknown.

    They are unknown where a domain has one sequence only: it does not say how far another would have been from it.
    """
    rows = _measured(profile)
    squares = np.zeros((len(rows), profile.layers.size, profile.n_expert))
    for index, influence in _influences(profile, what, rows):
        squares[index] += influence**2
    factors = [own.size / (own.size - 1) if own.size > 1 else np.nan for own in rows]
    errors: Doubles = np.sqrt(np.tensordot(factors, squares, axes=1))
    return errors


def captured_curve(profile: Profile, sizes: Sequence[int]) -> Doubles:
    """Return float64 (3, len(sizes)): the share of saliency that the best experts of each layer hold, and its interval.

    The share is the mean over layers; domains count alike. The interval, of 95 %, is one over sequences within each
    domain, with the experts that the whole profile would choose: it says how far other traffic of the same kind may be
    from this, not what is lost by choosing experts on little traffic. NaN where a domain has too few sequences for one.
    """
    rows = _measured(profile)
    order = np.argsort(-profile.total("saliency"), axis=1, kind="stable")
    ends = [size - 1 for size in sizes]
    own = np.cumsum(np.take_along_axis(shares(profile), order, axis=1), axis=1)
    share: Doubles = own[:, ends].mean(axis=0)
    if min((own.size for own in rows), default=0) < FEWEST:
        return np.stack([share, np.full(share.shape, np.nan), np.full(share.shape, np.nan)])
    # Shares add up, and so do influences. They sum to 0 in each domain; scaled, their mean over domains of means over
    # sequences has the error of the share.
    values = []
    for index, influence in _influences(profile, "saliency", rows):
        held = np.cumsum(np.take_along_axis(influence, order, axis=1), axis=1)[:, ends].mean(axis=0)
        values.append(held * rows[index].size * len(rows))
    sizes_of = np.cumsum([0, *(own.size for own in rows)])
    blocks = [np.arange(start, end) for start, end in pairwise(sizes_of)]
    low, high = estimate(np.array(values), blocks).interval()
    # A share is one, whatever t says.
    return np.stack([share, np.clip(share + low, 0, 1), np.clip(share + high, 0, 1)])


def _measured(profile: Profile) -> list[Ints]:
    """Indices of the sequences that were measured, of each domain that has any."""
    rows = [np.flatnonzero((profile.domain == index) & (profile.n_tokens > 0)) for index in range(len(profile.domains))]
    return [own for own in rows if own.size]


def _influences(profile: Profile, what: str, rows: Sequence[Ints]) -> Iterator[tuple[int, Doubles]]:
    """Yield the influence of each sequence on `shares`, to first order: an index of `rows`, and float64 (M, E).

    Shares are ratios of sums over domains of ratios, and this is their derivative by the weight of the sequence.
    """
    values = getattr(profile, what)
    total = profile.total(what)
    whole = np.maximum(total.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    share = total / whole
    for index, own in enumerate(rows):
        tokens = profile.n_tokens[own]
        mean = values[own].sum(axis=0, dtype=np.float64) / tokens.sum()
        for row, n in zip(own, tokens, strict=True):
            away = values[row] - n * mean
            yield index, (away - share * away.sum(axis=1, keepdims=True)) / (tokens.sum() * whole)


def verdict(profile: Profile, what: str = "saliency", seed: int = 0) -> Verdict:
    """Judge whether the differences between experts are real, and large enough to matter."""
    share = shares(profile, what)
    noise = (share_errors(profile, what) ** 2).mean(axis=1)
    true_variance = np.maximum(share.var(axis=1) - noise, 0)
    spread = np.sqrt(true_variance) / np.maximum(share.mean(axis=1), np.finfo(np.float64).tiny)
    return Verdict(
        spread=float(spread.mean()),
        agreement=_agreement(profile, what, seed) if np.isfinite(noise).all() else np.nan,
        n_sequences=int((profile.n_tokens > 0).sum()),
        n_tokens=int(profile.n_tokens.sum()),
    )


def _agreement(profile: Profile, what: str, seed: int) -> float:
    """Rank correlation between halves of the sequences, carried over to as many as there are (Spearman-Brown)."""
    rng = np.random.default_rng(seed)
    measured = np.flatnonzero(profile.n_tokens > 0)
    halves = np.zeros((HALVINGS, 2, profile.n_tokens.size), dtype=bool)
    for half, rest in halves:
        for index in range(len(profile.domains)):
            rows = rng.permutation(measured[profile.domain[measured] == index])
            half[rows[: rows.size // 2 + int(rng.integers(2)) * (rows.size % 2)]] = True
        rest[measured] = ~half[measured]
    if not halves.any(axis=2).all():
        return 0.0
    sums = _sums(profile, what, halves.reshape(2 * HALVINGS, -1).astype(np.float64))
    found = [_rank_correlation(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    correlation = max(0.0, float(np.mean(found)))
    return 2 * correlation / (1 + correlation)


def _sums(profile: Profile, what: str, weights: Doubles) -> Doubles:
    """float64 (n, M, E): sums over sequences, each with its weight (n, S); a few sequences are looked at at once."""
    values = getattr(profile, what)
    sums = np.zeros((len(weights), *values.shape[1:]))
    for at in range(0, len(values), _BLOCK):
        block = slice(at, at + _BLOCK)
        sums += np.tensordot(weights[:, block], values[block], axes=1)
    return sums


def _rank_correlation(a: Doubles, b: Doubles) -> float:
    """Mean over rows of Spearman's correlation."""
    ranks = [_ranks(values) for values in (a, b)]
    centred = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    return float(((centred[0] * centred[1]).sum(axis=1) / np.maximum(scale, np.finfo(np.float64).tiny)).mean())


def _ranks(values: Doubles) -> npt.NDArray[np.float64]:
    """Ranks along rows; equal values share their mean rank."""
    ranks = np.empty_like(values)
    for row, out in zip(values, ranks, strict=True):
        _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        out[:] = ((ends - counts + ends - 1) / 2)[inverse]
    return ranks
