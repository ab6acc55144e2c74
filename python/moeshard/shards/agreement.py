"""Whether two runs of the same tokens differ by more than rounding. Pure: arrays in, words out.

Rounding tips a near-tie of a router now and then. Then another expert computes, and all that follows differs by more
than rounding. So choices are compared first: a sequence is compared up to the layer in which its first choice differs,
and that choice must lie between experts whose scores are within rounding of each other.

How much rounding does is not derived but measured: between a shard and the same shard with its norms' weights changed a
little (`moeshard.shards.jitter`), by the same engine on the same processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeshard._core import MoeLayout
from moeshard.arrays import Floats, Ids
from moeshard.shards.runs import Run

# How many times what was measured is still taken for rounding: it is the extreme of a few hundred tokens, as is what it
# is compared with.
MARGIN = 4.0
# Of float32 sums of a few hundred numbers.
FLOAT_ROUNDING = 4e-6
# That an expert must have been chosen by before it is compared with others.
FEWEST_TOKENS = 6
# How far one may stand out: rounding is alike for all, but a few tokens are a small sample.
STANDING_OUT = 16.0


@dataclass(frozen=True)
class Spread:
    """How far apart numbers of two runs are, relative to their size."""

    typical: float
    """The median over all tokens and experts."""
    largest: float
    outlier: int = 0
    """The expert that stands out most, of those that enough tokens have."""
    standing_out: float = 0.0
    """What three of four of its tokens exceed, over what nine of ten tokens of all experts stay below."""


@dataclass(frozen=True)
class Routers:
    """How the routers of a model choose by their scores."""

    layout: MoeLayout
    """Of the whole model."""
    biases: dict[int, Floats]
    """Float32 (n_expert,) of the layers that add a bias to the scores before they choose."""

    def positive(self, scores: Floats) -> Floats:
        """Return scores (n_tokens, n_expert) of which a relative difference says something."""
        if self.layout.gating != "softmax_weight":
            return scores
        powers: Floats = np.exp(scores - np.nanmax(scores, axis=1, keepdims=True))  # of logits
        return powers

    def gap(self, layer: int, scores: Floats, chosen: Ids) -> float:
        """Return how far scores (n_expert,) lie from a choice: by so much some of them would have to change for it."""
        if layer in self.layout.hash_layers:
            return np.inf
        by = np.where(np.isnan(scores), -np.inf, self.positive(scores[None])[0] + self.biases.get(layer, 0))
        chosen = chosen[chosen >= 0]
        allowed = np.isfinite(by)
        n_groups = self.layout.n_expert_groups
        gap = 0.0
        if n_groups > 1:
            size = len(by) // n_groups
            groups = np.sort(by.reshape(n_groups, size), axis=1)[:, -2:].sum(axis=1)
            searched = np.unique(chosen // size)
            order = [group for group in np.argsort(-groups) if group not in searched]
            n_more = self.layout.n_expert_groups_used - len(searched)
            searched = np.concatenate([searched, np.asarray(order[: max(n_more, 0)], dtype=np.intp)])
            left = [groups[group] for group in order[max(n_more, 0) :]]
            # A group's score is a sum of two.
            gap = max(gap, (max(left, default=-np.inf) - groups[searched].min()) / 2)
            allowed &= np.isin(np.arange(len(by)) // size, searched)
        allowed[chosen] = False
        return max(gap, float(by[allowed].max(initial=-np.inf) - by[chosen].min()))


@dataclass(frozen=True)
class Swap:
    """A token that was sent to another expert, though nothing before had differed."""

    layer: int
    token: int
    gap: float
    """How far apart the scores were that rounding would have had to swap, relative to them."""
    noise: float
    """How far apart the two scores of another expert are for this token, at most."""


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other."""

    n_tokens: int
    n_choices: int
    """Tokens times layers whose choice was compared."""
    swaps: tuple[Swap, ...]
    numbers: dict[tuple[int, str], Spread]
    """By layer and by what they are: scores, weights, norms."""
    logits: Spread | None
    """Relative to the largest logit; None where each sequence had a swap."""
    n_compared: int
    """Tokens whose logits were compared."""
    same_likeliest: int
    """Of these tokens."""
    finite: bool = True
    """Whether all logits of both are numbers."""

    @property
    def exact(self) -> bool:
        """Whether the two are the same to the last bit."""
        spreads = [*self.numbers.values(), *([self.logits] if self.logits else [])]
        return self.finite and not self.swaps and all(spread.largest == 0 for spread in spreads)


def compare(whole: Run, shard: Run, routers: Routers) -> Comparison:
    """Compare two runs of the same probe: the masked whole model's, and another one's."""
    assert whole.layers == shard.layers
    n_tokens = whole.logits.shape[0]
    agree = np.ones(n_tokens, dtype=bool)
    swaps: list[Swap] = []
    numbers: dict[tuple[int, str], Spread] = {}
    n_choices = 0
    for i, layer in enumerate(whole.layers):
        if not agree.any():
            break
        n_choices += int(agree.sum())
        ours, theirs = routers.positive(whole.scores[i]), routers.positive(shard.scores[i])
        least = np.nanmin(np.where(np.isnan(whole.weights[i]), np.nan, ours), axis=1, keepdims=True)
        numbers[layer, "scores"] = _spread(ours[agree], theirs[agree], least[agree])
        numbers[layer, "weights"] = _spread(whole.weights[i][agree], shard.weights[i][agree])
        numbers[layer, "norms"] = _spread(whole.norms[i][agree], shard.norms[i][agree])
        ids = np.sort(whole.ids[i], axis=1), np.sort(shard.ids[i], axis=1)
        other = (ids[0] != ids[1]).any(axis=1) & agree
        for token in np.flatnonzero(other):
            swapped = np.setxor1d(ids[0][token], ids[1][token])
            gap = routers.gap(layer, whole.scores[i, token], shard.ids[i, token])
            apart = relative(ours[[token]], theirs[[token]], least[[token]])[0]
            apart[swapped[swapped >= 0]] = np.nan
            size = float(np.maximum(np.nanmax(ours[token, swapped]), least[token, 0]))
            swaps.append(Swap(layer, int(token), gap / size, float(np.nanmax(apart, initial=0.0))))
        agree &= ~np.repeat(other.reshape(-1, whole.length).any(axis=1), whole.length)
    finite = bool(np.isfinite(whole.logits).all() and np.isfinite(shard.logits).all())
    ours, theirs = whole.logits[agree], shard.logits[agree]
    logits = None
    if agree.any():
        largest = float(np.abs(whole.logits).max())
        apart = np.abs(ours - theirs).max(axis=1) / (largest or 1.0)
        logits = Spread(float(np.median(apart)), float(apart.max()))
    same = int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    return Comparison(n_tokens, n_choices, tuple(swaps), numbers, logits, int(agree.sum()), same, finite)


def judge(found: Comparison, rounding: Sequence[Comparison]) -> str | None:
    """Say what of a comparison with the masked model is more than rounding, if anything is.

    Args:
        found: of a shard.
        rounding: of two runs that differ by rounding.
    """
    if not found.finite:
        return "some logits are no numbers"
    for (layer, what), spread in found.numbers.items():
        measured = [other.numbers[layer, what] for other in rounding if (layer, what) in other.numbers]
        if measured and (why := _beyond(spread, measured)):
            return f"the {what} of layer {layer} are {why}"
    for swap in found.swaps:
        allowed = allowed_gap(swap, rounding)
        if swap.gap > allowed:
            return (
                f"layer {swap.layer} sends token {swap.token} to another expert, past scores that are {swap.gap:.1e} "
                f"apart, of their size; rounding explains {allowed:.1e}"
            )
    logits = [other.logits for other in rounding if other.logits]
    if found.logits and not logits:
        return (
            "what rounding does to the logits could not be measured: it sent a token of each sequence to other experts"
        )
    if found.logits and (why := _beyond(found.logits, logits)):
        return f"the logits are {why}"
    return None


def allowed_gap(swap: Swap, rounding: Sequence[Comparison]) -> float:
    """Return how far apart scores may be that rounding swaps: both move, and the scores of others for the same token
    say by how much."""
    scores = [other.numbers[swap.layer, "scores"] for other in rounding if (swap.layer, "scores") in other.numbers]
    return 2 * min(limit([spread.largest for spread in scores]), limit([swap.noise]))


def limit(measured: Sequence[float]) -> float:
    """Return what is still taken for rounding."""
    return MARGIN * max(measured, default=0.0) + FLOAT_ROUNDING


def _beyond(found: Spread, rounding: Sequence[Spread]) -> str | None:
    for name, what in (("largest", "up to"), ("typical", "typically")):
        value, allowed = getattr(found, name), limit([getattr(spread, name) for spread in rounding])
        if value > allowed:
            return f"{what} {value:.1e} apart, of their size; rounding explains {allowed:.1e}"
    if found.standing_out > STANDING_OUT:
        return f"{found.standing_out:.0f} times as far apart for expert {found.outlier} as for others"
    return None


def relative(a: Floats, b: Floats, least: Floats | None = None) -> Floats:
    """Return how far apart numbers (token, expert) are, NaN where there is none, relative to their size or to `least`,
    if that is more."""
    size = np.maximum(np.abs(a), np.abs(b))
    if least is not None:
        size = np.maximum(size, least)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.where(a == b, np.float32(0), np.abs(a - b) / size)
    apart[np.isnan(a) | np.isnan(b)] = np.nan
    return apart


def _spread(a: Floats, b: Floats, least: Floats | None = None) -> Spread:
    apart = relative(a, b, least)
    there = ~np.isnan(apart)
    values = apart[there]
    most = max(float(np.quantile(values, 0.9)), FLOAT_ROUNDING)
    counts = there.sum(axis=0)
    quartiles = np.take_along_axis(np.sort(apart, axis=0), counts[None] // 4, axis=0)[0]  # NaN is sorted to the end
    quartiles[counts < FEWEST_TOKENS] = 0
    outlier = int(quartiles.argmax())
    return Spread(float(np.median(values)), float(values.max()), outlier, float(quartiles[outlier]) / most)
