"""What a model loses by how many experts it keeps: measured with masks, before any file exists."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moeshard._core import GGUFMap, MoeshardError
from moeshard.evaluation.losses import PROMPT, measure_losses
from moeshard.evaluation.scores import Scorer, Scores, check_windows, scores_from_json
from moeshard.files.atomic import write_atomically
from moeshard.files.documents import check_version, expect, parse_named, read_document, take, write_document
from moeshard.gguf.identity import ModelIdentity, identify, model_from_json, model_to_json
from moeshard.keep.text import Keep
from moeshard.planning.options import ISLANDS
from moeshard.planning.planner import STRATEGY_NAMES, check_profile, choose_experts
from moeshard.profile.intervals import CONFIDENCE
from moeshard.profile.record import Profile
from moeshard.progress import Progress
from moeshard.traffic.domains import Domain
from moeshard.traffic.likeness import Likeness, likeness, likeness_from_json
from moeshard.traffic.windows import WINDOW, cut_windows

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

VERSION = 1
ONE_LIST = "one-list"
"""The same ids in every layer, by mass summed over layers: what older tools do."""
CURVE_STRATEGIES = ("ranked", "reap", ISLANDS, "contiguous", ONE_LIST)
"""Those that mean something for a lone node. Others deal experts out to several: of one they make another ranking."""
MULTIPLES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Of the experts that a token uses: what is measured unless told otherwise."""
RULE = (4, 8)
"""Multiples that a rule of thumb says are enough."""


@dataclass(frozen=True)
class Point:
    """What keeping some experts per layer costs."""

    keep: int
    """Experts per layer."""
    scores: Scores


@dataclass(frozen=True)
class Curve:
    """Loss by experts kept, for one or more ways of choosing them."""

    model: ModelIdentity
    strategies: dict[str, list[Point]]
    """Points of each strategy, by experts kept, ascending."""
    full: Scores
    """Of the whole model."""
    settings: dict[str, Any]
    """``n_expert_used`` (experts per token), ``window``, ``prompt``, of each domain ``windows`` and ``texts``
    (SHA-256), ``confidence``, and what `moeshard.traffic.likeness.Likeness` says of them."""

    @property
    def domains(self) -> list[str]:
        return list(self.full.domains)

    @property
    def n_expert_used(self) -> int:
        """Experts that a token uses."""
        return int(self.settings["n_expert_used"])

    @property
    def likeness(self) -> Likeness:
        """How the text relates to that which experts were chosen by."""
        return likeness_from_json(self.settings, "settings")

    def times_top_k(self, point: Point) -> float:
        """Return how many times as many experts are kept as a token uses."""
        return point.keep / self.n_expert_used

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write JSON that `read_curve` reads; docs/plans.md says what it holds.

        Raises MoeshardError where it cannot be written, or exists and `force` is False.
        """
        write_atomically(path, self.to_text(), force=force)

    def to_text(self) -> str:
        """Return what `save` writes."""
        return write_document(self.to_json(), "curve")

    def to_json(self) -> dict[str, Any]:
        """Return the object that `save` writes."""
        strategies = {
            name: [
                {
                    "keep": point.keep,
                    "fraction": point.keep / self.model.n_expert,
                    "times_top_k": self.times_top_k(point),
                    **point.scores.to_json(),
                }
                for point in points
            ]
            for name, points in self.strategies.items()
        }
        return {
            "moeshard_curve": VERSION,
            "model": model_to_json(self.model),
            "strategies": strategies,
            "domains": self.domains,
            "settings": self.settings,
            "full": self.full.to_json(),
        }

    def to_csv(self) -> str:
        """Return a table: a row per strategy, experts kept and domain (``all``: the mean over domains)."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for name, points in self.strategies.items():
            for point in points:
                start = (name, point.keep, point.keep / self.model.n_expert, self.times_top_k(point))
                for domain, scores in {"all": point.scores, **point.scores.domains}.items():
                    assert scores.agreement is not None
                    losses = (scores.nll, scores.excess, *scores.excess_ci, scores.ratio, *scores.ratio_ci)
                    writer.writerow((*start, domain, *losses, scores.agreement.kl, scores.agreement.top1))
        return buffer.getvalue()


_COLUMNS = (
    *("strategy", "keep", "fraction", "times_top_k", "domain", "nll", "excess", "excess_low", "excess_high"),
    *("ratio", "ratio_low", "ratio_high", "kl", "top1"),
)


def default_sizes(n_expert: int, n_expert_used: int, expert_groups: int = 1) -> list[int]:
    """Return numbers of experts per layer that show the curve: multiples of what a token uses, a quarter, half, all."""
    groups = max(1, expert_groups)
    wanted = [n_expert_used * times for times in MULTIPLES] + [n_expert // 4, n_expert // 2, n_expert]
    rounded = {-(-size // groups) * groups for size in wanted}
    return sorted(size for size in rounded if n_expert_used <= size <= n_expert)


def measure_curve(
    model: Model,
    profile: Profile,
    domains: Sequence[Domain],
    *,
    sizes: Sequence[int] | None = None,
    strategies: Sequence[str] = ("ranked",),
    n_windows: int | None = None,
    window: int = WINDOW,
    n_prompt: int = PROMPT,
    confidence: float = CONFIDENCE,
    progress: Progress | None = None,
) -> Curve:
    """Measure what keeping few experts costs, all keeps side by side on the same text.

    Args:
        model: the whole model.
        profile: of that model; experts are chosen by it.
        domains: text that the profile was not made from.
        sizes: experts per layer; None: `default_sizes`.
        strategies: of `CURVE_STRATEGIES`, each for a single node.
        n_windows, window, n_prompt, progress: see `moeshard.evaluation.losses.measure_losses`; only tokens after
            the prompt count, so that figures compare with those of plans.
        confidence: of intervals.

    Raises:
        MoeshardError: the profile is of another model, a size is one that the model cannot have, an unknown strategy,
            or too little text.
    """
    identity = identify(GGUFMap(model.path))
    check_profile(profile, identity, model.path)
    groups = max(1, model.layout.n_expert_groups)
    sizes = default_sizes(model.n_expert, model.n_expert_used, groups) if sizes is None else sorted(set(sizes))
    _check_choice(model, sizes, strategies)
    keeps = [lone_node(profile, size, name, expert_groups=groups) for name in strategies for size in sizes]
    # Said before the work, not after it.
    check_windows([domain.name for domain in domains], cut_windows(model, domains, window, n_windows)[1], window)
    losses = measure_losses(
        model, keeps, domains, n_windows=n_windows, window=window, n_prompt=n_prompt, progress=progress
    )
    scorer = Scorer(losses, confidence=confidence)
    points = [Point(sizes[index % len(sizes)], scorer.group(index)) for index in range(len(keeps))]
    return Curve(
        identity,
        {name: points[at * len(sizes) : (at + 1) * len(sizes)] for at, name in enumerate(strategies)},
        scorer.full(),
        {
            "n_expert_used": model.n_expert_used,
            "window": window,
            "prompt": n_prompt,
            "windows": {name: int((losses.domain == index).sum()) for index, name in enumerate(losses.domains)},
            "texts": {domain.name: domain.digest for domain in domains},
            "confidence": confidence,
            **asdict(likeness(domains, profile.facts.get("texts"), profile.facts.get("sketches"))),
        },
    )


def lone_node(profile: Profile, size: int, strategy: str, *, expert_groups: int = 1) -> Keep:
    """Return bool (n_layer, n_expert): what a node that has no others beside it holds; see `choose_experts`.

    Raises:
        MoeshardError: a strategy that is none of `CURVE_STRATEGIES`, or a size that the model cannot have.
    """
    check_curve_strategy(strategy)
    if strategy == ONE_LIST:
        mass = np.asarray(profile.mass).sum(axis=1, keepdims=True)
        profile = replace(profile, saliency=np.broadcast_to(mass, profile.mass.shape))
        strategy = "ranked"
    return choose_experts(profile, [size], strategy, expert_groups=expert_groups)[0]


def check_curve_strategy(strategy: str) -> None:
    """Raise a `MoeshardError` where a strategy is none of `CURVE_STRATEGIES`."""
    if strategy in CURVE_STRATEGIES:
        return
    choose = f"choose from {', '.join(CURVE_STRATEGIES)}"
    if strategy in STRATEGY_NAMES:
        raise MoeshardError(
            f"strategy '{strategy}' deals experts out to several nodes, and a curve is of one that stands alone; "
            f"{choose}"
        )
    raise MoeshardError(f"unknown strategy '{strategy}'; {choose}")


def _check_choice(model: Model, sizes: Sequence[int], strategies: Sequence[str]) -> None:
    if not sizes or not strategies or len(set(strategies)) < len(strategies):
        raise MoeshardError("a curve needs at least one number of experts to keep, and strategies that differ")
    if sizes[0] < model.n_expert_used:
        raise MoeshardError(f"a node cannot do with {sizes[0]} experts per layer: a token uses {model.n_expert_used}")


def read_curve(path: str | os.PathLike[str]) -> Curve:
    """Read what `Curve.save` wrote.

    Raises:
        MoeshardError: the file cannot be read, or is no curve; naming the file and the place in it.
    """
    return parse_named(path, "curve", read_document(path, "curve"), curve_from_json)


def curve_from_json(document: dict[str, Any]) -> Curve:
    """Read the document of a file, as `read_curve` does."""
    check_version(document, "moeshard_curve", VERSION, "curve")
    strategies = {}
    for name, values in take(document, "strategies", dict).items():
        where = f"strategies.{name}"
        points = []
        for index, value in enumerate(expect(values, list, where)):
            place = f"{where}[{index}]"
            point = expect(value, dict, place)
            points.append(Point(take(point, "keep", int, place), scores_from_json(point, place)))
            if points[-1].scores.agreement is None:
                raise MoeshardError(f"{place}.kl: is missing; expected a number")
        if not points:
            raise MoeshardError(f"{where}: is empty; expected at least one point")
        strategies[name] = points
    if not strategies:
        raise MoeshardError("strategies: is empty; expected at least one")
    settings = take(document, "settings", dict)
    likeness_from_json(settings, "settings")
    if take(settings, "n_expert_used", int, "settings") < 1:
        raise MoeshardError("settings.n_expert_used: is less than 1")
    return Curve(
        model_from_json(take(document, "model", dict)),
        strategies,
        scores_from_json(take(document, "full", dict), "full"),
        settings,
    )


def rule_of_thumb(curve: Curve, near: float = 1.1) -> list[str]:
    """Return sentences that say what 4 and 8 times the experts that a token uses cost, and how many are enough.

    Enough is the fewest kept from which on the perplexity is below `near` times the whole model's.
    """
    sentences = []
    for name, points in curve.strategies.items():
        parts = []
        for point in points:
            if point.keep in {times * curve.n_expert_used for times in RULE}:
                low, high = point.scores.ratio_ci
                parts.append(
                    f"at {curve.times_top_k(point):.0f} x top-k ({point.keep} of {curve.model.n_expert} experts) "
                    f"perplexity is {point.scores.ratio:.2f} ({low:.2f} to {high:.2f}) times the whole model's"
                )
        enough = None
        for point in reversed(points):
            if point.scores.ratio >= near:
                break
            enough = point
        if enough is None:
            parts.append(f"no number that was measured brings it below {near:g}")
        elif enough.keep == curve.model.n_expert:
            parts.append(f"of what was measured, only all experts bring it below {near:g}")
        else:
            parts.append(f"below {near:g} it is from {enough.keep} experts ({curve.times_top_k(enough):g} x top-k) on")
        sentences.append(f"{name}: {'; '.join(parts)}.")
    return sentences
