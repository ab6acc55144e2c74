"""Degenerate loops: how often a model's own answers fall into repeating themselves.

Two signs of an answer are looked at: how much of it are n-grams that it had already, and how few different tokens its
end consists of. What is too much is learned on one half of the full model's own answers, and how often that is a false
alarm is measured on the other half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Tokens
from moeshard.placement.nodes import NodeModel
from moeshard.runtime.answers import Request, Sampling, write_answers

if TYPE_CHECKING:
    from moeshard.evaluation.scores import Interval
    from moeshard.runtime.model import Model


NGRAM = 4
TAIL = 64
"""Tokens at the end of an answer."""
QUANTILE = 0.975
"""Of the full model's answers, so many are within each of the two thresholds."""
N_ANSWERS = 4
"""Per domain, by default."""
N_TOKENS = 128
MOST_EXAMPLES = 5


@dataclass(frozen=True)
class Signs:
    """What an answer shows of looping."""

    repetition: float
    """Share of 4-grams that stood in it before, 0 to 1: of the whole answer or of its last 64 tokens, the larger."""
    entropy: float
    """Entropy of the tokens among the last 64, of the largest that so many can have; 1: all differ, 0: all are one."""


@dataclass(frozen=True)
class Thresholds:
    """What makes an answer count as a loop: more repetition, or less entropy."""

    repetition: float
    entropy: float

    def flags(self, signs: Signs) -> bool:
        return signs.repetition > self.repetition or signs.entropy < self.entropy


@dataclass(frozen=True)
class Rate:
    """Share of answers that are loops."""

    rate: float
    ci: Interval
    """Wilson's."""
    n: int


@dataclass(frozen=True)
class Example:
    """An answer that is a loop."""

    node: str
    domain: str
    text: str


@dataclass(frozen=True)
class Loops:
    """How often the full model and nodes loop, on the same prompts with the same seeds."""

    n: int
    """Answers per domain, of the full model and of each node."""
    tokens: int
    """Length of an answer that the model does not end itself."""
    seeds: list[int]
    """Of the answers of a domain, in order."""
    threshold_seeds: list[int]
    """Of the full model's further answers, which the thresholds were learned on."""
    temperature: float
    thresholds: Thresholds
    full: Rate
    """Of the full model's answers that did not set the thresholds: what is flagged here are false alarms."""
    groups: dict[str, Rate]
    """By name of node, all prompts on each."""
    placed: Rate
    """Each prompt on the node that its session was placed on."""
    examples: list[Example]

    @property
    def false_alarms(self) -> float:
        return self.full.rate


@dataclass(frozen=True, eq=False)
class Prompt:
    """The beginning of a session."""

    domain: str
    tokens: Tokens
    node: int
    """Where the session was placed."""


def signs_of(answer: npt.ArrayLike) -> Signs:
    """Measure an answer, ids (n,). One too short for a 4-gram shows nothing: repetition 0."""
    tokens = np.asarray(answer)
    tail = tokens[-TAIL:]
    return Signs(max(_repetition(tokens), _repetition(tail)), _entropy(tail))


def _repetition(tokens: npt.NDArray[np.integer]) -> float:
    if tokens.size < NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, NGRAM)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def _entropy(tokens: npt.NDArray[np.integer]) -> float:
    if tokens.size < 2:
        return 1.0
    share = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(share * np.log(share)).sum() / math.log(tokens.size))


def learn_thresholds(answers: Sequence[Signs], quantile: float = QUANTILE) -> Thresholds:
    """Return thresholds within each of which another answer of the same kind is with probability `quantile`.

    Of n answers the k-th most extreme is taken, k being (n + 1)(1 - quantile) rounded down, but at least 1 (as in
    conformal prediction). Below 39 answers this is the most extreme one of all, and the probability is n / (n + 1).

    Raises:
        MoeshardError: there are no answers.
    """
    if not answers:
        raise MoeshardError("thresholds of loops need some answers to be learned on")
    k = max(1, math.floor((len(answers) + 1) * (1 - quantile) + 1e-9))
    repetition = sorted((signs.repetition for signs in answers), reverse=True)
    entropy = sorted(signs.entropy for signs in answers)
    return Thresholds(repetition[k - 1], entropy[k - 1])


def rate_of(flags: Sequence[bool], confidence: float) -> Rate:
    """Return the share of flags that are up, with Wilson's interval (JASA 22, 1927)."""
    n = len(flags)
    share = sum(flags) / n
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the interval reaches 0 and 1, but for rounding.
    return Rate(share, (middle - half if share > 0 else 0.0, middle + half if share < 1 else 1.0), n)


def measure_loops(
    model: Model,
    nodes: dict[str, NodeModel],
    prompts: Sequence[Prompt],
    *,
    n_answers: int = N_ANSWERS,
    n_tokens: int = N_TOKENS,
    sampling: Sampling | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    progress: Callable[[int, int], object] | None = None,
) -> Loops:
    """Let the full model and every node answer prompts, and count the answers that are loops.

    Args:
        model: the full model.
        nodes: by name, of `moeshard.placement.nodes`.
        prompts: of each domain about as many as there are; where there are less than twice `n_answers`, they serve
            several times with other seeds.
        n_answers: per domain, of each node and of each half of the full model's.
        n_tokens: of each answer.
        sampling: see `moeshard.runtime.answers.Sampling`.
        seed: the first one.
        confidence: of intervals.
        progress: called with the answers written and all of them; what it raises ends the work.
    """
    sampling = sampling or Sampling()
    rated, learning = _choose(prompts, n_answers)
    seeds = [seed + number for number in range(2 * n_answers)]
    own, other = seeds[:n_answers], seeds[n_answers:]
    wanted: dict[str | None, list[Request]] = {None: _requests(rated, own, None) + _requests(learning, other, None)}
    models: dict[str | None, Model] = {None: model}
    for name, node in nodes.items():
        wanted[name] = _requests(rated, own, node.keep)
        models[name] = node.model
    answers = _write_all(wanted, models, n_tokens, sampling, progress)

    signs = {name: [signs_of(answer) for answer in written] for name, written in answers.items()}
    thresholds = learn_thresholds(signs[None][len(rated) :])
    flags = {name: [thresholds.flags(found) for found in signs[name][: len(rated)]] for name in signs}
    names = list(nodes)
    return Loops(
        n=n_answers,
        tokens=n_tokens,
        seeds=own,
        threshold_seeds=other,
        temperature=sampling.temperature,
        thresholds=thresholds,
        full=rate_of(flags[None], confidence),
        groups={name: rate_of(flags[name], confidence) for name in names},
        placed=rate_of([flags[names[prompt.node]][row] for row, prompt in enumerate(rated)], confidence),
        examples=[
            Example(name, rated[row].domain, model.detokenize(answers[name][row]))
            for name in names
            for row in np.flatnonzero(flags[name])[: max(1, MOST_EXAMPLES // len(names))]
        ][:MOST_EXAMPLES],
    )


def _choose(prompts: Sequence[Prompt], n_answers: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts of the rated answers, and others of those that thresholds are learned on; per domain, evenly spread."""
    rated, learning = [], []
    for domain in dict.fromkeys(prompt.domain for prompt in prompts):
        own = [prompt for prompt in prompts if prompt.domain == domain]
        wanted = 2 * n_answers
        rows = [k * len(own) // wanted if len(own) >= wanted else k % len(own) for k in range(wanted)]
        rated += [own[row] for row in rows[::2]]
        learning += [own[row] for row in rows[1::2]]
    return rated, learning


def _requests(prompts: Sequence[Prompt], seeds: Sequence[int], keep: npt.NDArray[np.bool_] | None) -> list[Request]:
    return [Request(prompt.tokens, seeds[row % len(seeds)], keep) for row, prompt in enumerate(prompts)]


def _write_all(
    wanted: dict[str | None, list[Request]],
    models: dict[str | None, Model],
    n_tokens: int,
    sampling: Sampling,
    progress: Callable[[int, int], object] | None,
) -> dict[str | None, list[Tokens]]:
    """All answers by node, None being the full model; what runs on one model shares batches."""
    total = sum(map(len, wanted.values()))
    done = 0

    def step(finished: int) -> None:
        nonlocal done
        done += finished
        if progress is not None:
            progress(done, total)

    answers: dict[str | None, list[Tokens]] = {}
    for model in {id(own): own for own in models.values()}.values():
        names = [name for name, own in models.items() if own is model]
        requests = [request for name in names for request in wanted[name]]
        written = iter(write_answers(model, requests, n_tokens, sampling=sampling, progress=step))
        answers |= {name: [next(written) for _ in wanted[name]] for name in names}
    return answers
