"""What an evaluation found, and the JSON file that keeps it. Schema: docs/evaluation.md."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from moeshard._core import MoeshardError
from moeshard.evaluation.alarms import Alarms, alarms_from_json, alarms_to_json
from moeshard.evaluation.loops import Example, Loops, Rate, Thresholds
from moeshard.evaluation.scores import Interval, Scores, interval, scores_from_json
from moeshard.files.atomic import write_atomically
from moeshard.files.documents import check_version, expect, parse_named, read_document, take, write_document
from moeshard.files.provenance import MADE
from moeshard.gguf.identity import ModelIdentity, model_from_json, model_to_json
from moeshard.traffic.likeness import Likeness, likeness_from_json

VERSION = 2
_KEY = "moeshard_evaluation"


@dataclass(frozen=True)
class Settings:
    """What was measured, and how."""

    window: int
    """Tokens predicted in each window."""
    prompt: int
    """Of them, so many place the session and are not scored."""
    windows: dict[str, int]
    """Per domain."""
    texts: dict[str, str]
    """SHA-256 of each domain's texts, see `moeshard.traffic.domains.Domain.digest`."""
    likeness: Likeness
    """How these texts relate to those that the plan was made from, as far as the plan says."""
    confidence: float
    seed: int
    """The first one of the answers."""
    shards: str | None
    """The folder of the shards that were run; None: masks on the model."""
    recovery: str | None
    """The folder of the recoveries that corrected the nodes' experts; None: nothing did, or the shards hold it."""
    n_expert_used: dict[str, Any]
    """Experts per token: ``full``, an integer, and ``nodes``, one each."""


@dataclass(frozen=True)
class GroupScores:
    """All windows on one node."""

    name: str
    scores: Scores
    captured: float
    """Share of the prompts' saliency, by the whole model's router, of experts that the node holds."""


@dataclass(frozen=True)
class ProbeScores:
    """What a probe that places sessions by their prompts is worth."""

    nll: float
    """Nats per token, of sessions as it places them."""
    excess: float
    """Over the whole model."""
    right: float
    """Share of sessions on their best node."""
    regret: float
    """Nats per token over the best node of each session."""
    regret_ci: Interval


@dataclass(frozen=True)
class Evaluation:
    """What a plan's nodes lose on some text: see docs/evaluation.md."""

    model: ModelIdentity
    plan_file: str
    """Empty where the plan was no file."""
    strategy: str
    parameters: dict[str, Any]
    settings: Settings
    domains: list[str]
    full: Scores
    groups: list[GroupScores]
    hashed: Scores
    """Mean over the nodes: sessions that are sent to any node."""
    placed: Scores
    """Each session on the node that `probe` finds."""
    probe: str
    share: dict[str, float]
    """Of the sessions, by node, as placed."""
    oracle: Scores
    """Each session on the node that turns out best."""
    probes: dict[str, ProbeScores]
    loops: Loops | None
    alarms: Alarms | None = None
    """When sessions have to be looked at again; None for nodes that are no masks, and in files of version 1."""
    made: dict[str, Any] = field(default_factory=dict)
    """See `moeshard.files.provenance`; empty where nobody said."""

    def to_json(self) -> dict[str, Any]:
        """Return the object that `read_evaluation` reads from a file."""
        own = self.probes[self.probe]
        about = {"probe": self.probe, "right": own.right, "regret": own.regret, "regret_ci": list(own.regret_ci)}
        return {
            _KEY: VERSION,
            "model": model_to_json(self.model),
            "plan": {"file": self.plan_file, "strategy": self.strategy, "parameters": self.parameters},
            "settings": _settings_to_json(self.settings),
            "domains": self.domains,
            "full": self.full.to_json(),
            "groups": [
                {"name": group.name, **group.scores.to_json(), "captured": group.captured} for group in self.groups
            ],
            "hashed": self.hashed.to_json(),
            "placed": {**self.placed.to_json(), **about, "share": self.share},
            "oracle": self.oracle.to_json(),
            "probes": {name: asdict(probe) for name, probe in self.probes.items()},
            "generation": None if self.loops is None else _loops_to_json(self.loops),
            "meter": None if self.alarms is None else alarms_to_json(self.alarms),
            **({MADE: self.made} if self.made else {}),
        }

    def to_text(self) -> str:
        """Return what `save` writes."""
        return write_document(self.to_json(), "evaluation")

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the evaluation to a JSON file, which appears whole or not at all.

        Raises:
            MoeshardError: the file cannot be written, or it exists and `force` is False.
        """
        write_atomically(path, self.to_text(), force=force)


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read what `Evaluation.save` wrote. Keys that it does not know are passed over.

    Raises:
        MoeshardError: the file cannot be read, is no evaluation, is of another version, or something in it is missing
            or wrong; naming the file and the place in it, such as ``groups[1].nll``.
    """
    return parse_named(path, "evaluation", read_document(path, "evaluation"), evaluation_from_json)


def evaluation_from_json(document: dict[str, Any]) -> Evaluation:
    """Read the document of a file, as `read_evaluation` does."""
    check_version(document, _KEY, VERSION, "evaluation", oldest=1)
    plan = take(document, "plan", dict)
    placed = take(document, "placed", dict)
    domains = _list(document, "domains", str)
    groups = [_group(group, f"groups[{index}]") for index, group in enumerate(_list(document, "groups", dict))]
    if not groups:
        raise MoeshardError("groups: is empty, but an evaluation is of at least one node")
    share = take(placed, "share", dict, "placed")
    found = Evaluation(
        model=model_from_json(take(document, "model", dict)),
        plan_file=take(plan, "file", str, "plan"),
        strategy=take(plan, "strategy", str, "plan"),
        parameters=take(plan, "parameters", dict, "plan"),
        settings=_settings(take(document, "settings", dict)),
        domains=domains,
        full=_scores(document, "full"),
        groups=groups,
        hashed=_scores(document, "hashed"),
        placed=scores_from_json(placed, "placed"),
        probe=take(placed, "probe", str, "placed"),
        share={name: expect(value, float, f"placed.share.{name}") for name, value in share.items()},
        oracle=_scores(document, "oracle"),
        probes={name: _probe(value, f"probes.{name}") for name, value in take(document, "probes", dict).items()},
        loops=None if document.get("generation") is None else _loops(take(document, "generation", dict)),
        alarms=None if document.get("meter") is None else alarms_from_json(take(document, "meter", dict), "meter"),
        made=take(document, MADE, dict) if MADE in document else {},
    )
    _check(found)
    return found


def _check(found: Evaluation) -> None:
    """Raise a `MoeshardError` where parts of an evaluation do not belong together."""
    if found.probe not in found.probes:
        raise MoeshardError(f"placed.probe: '{found.probe}' is not one of probes: {', '.join(found.probes)}")
    scores = {f"groups[{index}]": group.scores for index, group in enumerate(found.groups)}
    scores |= {"hashed": found.hashed, "placed": found.placed, "oracle": found.oracle}
    for where, value in (*scores.items(), ("full", found.full)):
        if list(value.domains) != found.domains:
            raise MoeshardError(f"{where}.domains: must be {', '.join(found.domains)}, as domains says")
    for where, value in scores.items():
        if value.agreement is None or any(own.agreement is None for own in value.domains.values()):
            raise MoeshardError(f"{where}.kl: is missing there or in one of its domains; expected a number")


def _list(source: dict[str, Any], key: str, kind: type[Any], parent: str = "") -> list[Any]:
    place = f"{parent}.{key}" if parent else key
    values = take(source, key, list, parent)
    return [expect(value, kind, f"{place}[{index}]") for index, value in enumerate(values)]


def _scores(document: dict[str, Any], key: str) -> Scores:
    return scores_from_json(take(document, key, dict), key)


def _group(value: dict[str, Any], where: str) -> GroupScores:
    return GroupScores(
        take(value, "name", str, where), scores_from_json(value, where), take(value, "captured", float, where)
    )


def _probe(value: object, where: str) -> ProbeScores:
    source = expect(value, dict, where)
    nll, excess, right, regret = (take(source, key, float, where) for key in ("nll", "excess", "right", "regret"))
    return ProbeScores(nll, excess, right, regret, interval(source, "regret_ci", where))


def _settings_to_json(settings: Settings) -> dict[str, Any]:
    found = asdict(settings)
    told = found.pop("likeness")
    if settings.recovery is None:
        del found["recovery"]
    return {**found, **told}


def _settings(value: dict[str, Any]) -> Settings:
    where = "settings"
    windows, texts = take(value, "windows", dict, where), take(value, "texts", dict, where)
    used = take(value, "n_expert_used", dict, where)
    return Settings(
        window=take(value, "window", int, where),
        prompt=take(value, "prompt", int, where),
        windows={name: expect(number, int, f"{where}.windows.{name}") for name, number in windows.items()},
        texts={name: expect(digest, str, f"{where}.texts.{name}") for name, digest in texts.items()},
        likeness=likeness_from_json(value, where),
        confidence=take(value, "confidence", float, where),
        seed=take(value, "seed", int, where),
        shards=None if value.get("shards") is None else take(value, "shards", str, where),
        recovery=None if value.get("recovery") is None else take(value, "recovery", str, where),
        n_expert_used={
            "full": take(used, "full", int, f"{where}.n_expert_used"),
            "nodes": _list(used, "nodes", int, f"{where}.n_expert_used"),
        },
    )


def _loops_to_json(loops: Loops) -> dict[str, Any]:
    groups = [{"name": name, **asdict(rate)} for name, rate in loops.groups.items()]
    return {**asdict(loops), "groups": groups, "false_alarms": loops.false_alarms}


def _loops(value: dict[str, Any]) -> Loops:
    where = "generation"
    thresholds = take(value, "thresholds", dict, where)
    groups = {}
    for index, group in enumerate(_list(value, "groups", dict, where)):
        place = f"{where}.groups[{index}]"
        groups[take(group, "name", str, place)] = _rate(group, place)
    return Loops(
        n=take(value, "n", int, where),
        tokens=take(value, "tokens", int, where),
        seeds=_list(value, "seeds", int, where),
        threshold_seeds=_list(value, "threshold_seeds", int, where),
        temperature=take(value, "temperature", float, where),
        thresholds=Thresholds(
            take(thresholds, "repetition", float, f"{where}.thresholds"),
            take(thresholds, "entropy", float, f"{where}.thresholds"),
        ),
        full=_rate(take(value, "full", dict, where), f"{where}.full"),
        groups=groups,
        placed=_rate(take(value, "placed", dict, where), f"{where}.placed"),
        examples=[
            Example(*(take(example, key, str, f"{where}.examples[{index}]") for key in ("node", "domain", "text")))
            for index, example in enumerate(_list(value, "examples", dict, where))
        ],
    )


def _rate(value: dict[str, Any], where: str) -> Rate:
    return Rate(take(value, "rate", float, where), interval(value, "ci", where), take(value, "n", int, where))
