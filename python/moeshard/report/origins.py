"""Where a report comes from: the files it is made from, what made them, and the texts that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from moeshard.files.provenance import MADE, stamp
from moeshard.report.figure import Cell, Table
from moeshard.report.sources import Sources

_DIGITS = 12
"""Of a text's SHA-256: enough to tell it from another, and to fit a phone."""
_UNKNOWN = "not recorded"


def origins(sources: Sources) -> tuple[str, list[tuple[str, Table]]]:
    """Return when and by which version the report was made, and tables under titles."""
    now = stamp()
    model = sources.model
    rows: list[list[Cell]] = []
    commands: list[list[Cell]] = []
    for kind, made in _made(sources):
        name = sources.files.get(kind, _UNKNOWN)
        rows.append([kind, name, _minute(_text(made, "date")), _text(made, "moeshard")])
        commands.append([kind, _text(made, "command")])
    facts: list[list[Cell]] = [
        ["name", model.name],
        ["architecture", model.arch],
        ["file", str((sources.plan.model.facts if sources.plan else {}).get("path", _UNKNOWN))],
        ["fingerprint", model.fingerprint],
    ]
    texts: list[list[Cell]] = [
        [use, domain, digest[:_DIGITS]] for use, found in _texts(sources) for domain, digest in found.items()
    ]
    tables = [
        ("The model", Table(["", ""], facts)),
        ("Files", Table(["", "file", "made on (UTC)", "by moeshard"], rows)),
        ("Commands", Table(["", "command"], commands)),
        ("Texts, by their SHA-256", Table(["used to", "domain", "begins with"], texts)),
    ]
    return f"Made on {_minute(now['date'])} (UTC) by moeshard {now['moeshard']}.", [
        table for table in tables if table[1].rows
    ]


def _made(sources: Sources) -> Iterator[tuple[str, Mapping[str, Any]]]:
    profile, plan, evaluation, curve = sources.profile, sources.plan, sources.evaluation, sources.curve
    for kind, found in (
        ("profile", None if profile is None else profile.facts.get(MADE, {})),
        ("plan", None if plan is None else plan.extra.get(MADE, {})),
        ("evaluation", None if evaluation is None else evaluation.made),
        ("curve", None if curve is None else curve.settings.get(MADE, {})),
    ):
        if found is not None:
            # Facts are free: another tool may have written anything.
            yield kind, found if isinstance(found, dict) else {}


def _texts(sources: Sources) -> Iterator[tuple[str, dict[str, str]]]:
    profile, plan, evaluation, curve = sources.profile, sources.plan, sources.evaluation, sources.curve
    chosen = profile.facts.get("texts") if profile else plan.parameters.get("texts") if plan else None
    for use, found in (
        ("choose experts", chosen),
        ("evaluate", evaluation.settings.texts if evaluation else None),
        ("measure the curve", curve.settings.get("texts") if curve else None),
    ):
        if isinstance(found, dict):
            yield use, {str(name): str(digest) for name, digest in found.items()}


def _minute(date: str) -> str:
    """Write ``2026-03-01T12:34:56+00:00`` shorter; anything else as it is."""
    try:
        return datetime.fromisoformat(date).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return date


def _text(made: Mapping[str, Any], key: str) -> str:
    return str(made.get(key, _UNKNOWN))
