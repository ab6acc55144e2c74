"""The files that a report is made from, recognised by what they hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeshard._core import MoeshardError
from moeshard.evaluation.curve import Curve, curve_from_json
from moeshard.evaluation.record import Evaluation, evaluation_from_json
from moeshard.files.documents import parse_named, read_document
from moeshard.files.text import readable_document
from moeshard.gguf.identity import ModelIdentity
from moeshard.planning.plan import Plan, plan_from_json
from moeshard.profile.record import Profile, read_profile


@dataclass(frozen=True)
class Sources:
    """What there is to report on; at least one."""

    profile: Profile | None = None
    plan: Plan | None = None
    evaluation: Evaluation | None = None
    curve: Curve | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Where each was read from, by the names above."""

    @property
    def model(self) -> ModelIdentity:
        found = self.profile or self.plan or self.evaluation or self.curve
        assert found is not None
        return found.model


def read_sources(paths: Sequence[str | os.PathLike[str]]) -> Sources:
    """Read a profile, a plan, an evaluation and a curve, or some of them, in any order.

    Raises:
        MoeshardError: a file cannot be read or is none of these, there are two of a kind, or they are of different
            models or nodes; it names the files.
    """
    if not paths:
        raise MoeshardError("nothing to report on; give a profile, a plan, an evaluation or a curve")
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    for path in paths:
        name = os.fspath(path)
        kind, value = _read(name)
        if kind in found:
            raise MoeshardError(f"'{names[kind]}' and '{name}' are both {_ARTICLES[kind]}; give one")
        for other, known in found.items():
            if not known.model.is_same(value.model):
                raise MoeshardError(
                    f"'{names[other]}' is of the model {known.model}, but '{name}' is of {value.model}; give files of "
                    f"one model"
                )
        found[kind], names[kind] = value, name
    sources = Sources(**found, files=names)
    if sources.plan is not None and sources.evaluation is not None:
        planned, scored = (
            [node.name for node in sources.plan.nodes],
            [group.name for group in sources.evaluation.groups],
        )
        if planned != scored:
            raise MoeshardError(
                f"'{names['evaluation']}' is of the nodes {', '.join(scored)}, but '{names['plan']}' has "
                f"{', '.join(planned)}; give the plan that was evaluated"
            )
    return sources


_PARSERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plan": plan_from_json,
    "evaluation": evaluation_from_json,
    "curve": curve_from_json,
}
_ARTICLES = {"profile": "a profile", "plan": "a plan", "evaluation": "an evaluation", "curve": "a curve"}


def _read(name: str) -> tuple[str, Any]:
    if _is_archive(name):
        profile = read_profile(name)
        return "profile", replace(profile, domains=readable_document(profile.domains))
    document = readable_document(read_document(name, "file"))
    for kind, parse in _PARSERS.items():
        if f"moeshard_{kind}" in document:
            return kind, parse_named(name, kind, document, parse)
    raise MoeshardError(
        f"'{name}' is no profile, plan, evaluation or curve; `moeshard analyze`, `plan`, `evaluate` and `curve` make "
        f"these"
    )


def _is_archive(name: str) -> bool:
    """Whether a file begins as an ``.npz`` does. One that cannot be read is left to the reader that says so."""
    try:
        with open(name, "rb") as file:
            return file.read(2) == b"PK"
    except (OSError, ValueError):
        return False
