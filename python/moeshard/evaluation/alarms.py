"""When a session has to be looked at again: learned from what tokens miss on each node, and what that costs.

Losses and what tokens missed are known of every window on every node. Windows on the node that they are placed on say
what is normal there; windows on which the node loses more than was promised say what is not. See docs/evaluation.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import log
from typing import Any

import numpy as np

from moeshard.arrays import Doubles
from moeshard.evaluation.losses import Losses
from moeshard.files.documents import expect, take
from moeshard.placement.decision import MIN_QUALITY
from moeshard.placement.meter import Limits, evidence
from moeshard.profile.intervals import FEWEST

PIECE = 32
"""Tokens over which missed share and excess loss are compared."""
RATE = 0.4
"""Of windows where they belong, so many are looked at again: that costs a probe each, and mostly moves nothing."""
_LEVEL = 0.7
"""The reference lies so far from what is normal to what breaks the promise."""


@dataclass(frozen=True)
class Relation:
    """Excess loss of pieces of text, nats per token, by the share that they missed: a straight line and its scatter."""

    intercept: float
    slope: float
    scatter: float
    """Standard deviation of pieces about the line."""
    correlation: float
    n: int
    """Pieces, over all nodes."""


@dataclass(frozen=True)
class NodeAlarm:
    """What is normal on a node, and what is not."""

    name: str
    normal: float | None
    """Mean share missed by windows that are placed there; None: there were too few."""
    broken: float | None
    """The same of windows with which the node breaks the promise; None: there were too few."""
    limits: Limits | None
    """None: too few windows to tell; sessions are never moved from there."""


@dataclass(frozen=True)
class Alarms:
    """What was learned on some text; see `learn_alarms`."""

    quality: float
    """The promise: perplexity of the whole model over the node's, at least."""
    looked_at: float
    """Share of the windows where they belong that pass the limits."""
    relation: Relation
    nodes: list[NodeAlarm]

    def limits(self) -> dict[str, Limits]:
        """Return the limits of the nodes that have some."""
        return {node.name: node.limits for node in self.nodes if node.limits is not None}


def learn_alarms(losses: Losses, names: list[str], quality: float = MIN_QUALITY, rate: float = RATE) -> Alarms | None:
    """Learn when to look at a session again.

    Args:
        losses: of `moeshard.evaluation.losses.measure_losses`, on text that nothing is judged on later.
        names: of the nodes.
        quality: that is promised, above 0.
        rate: share of windows where they belong that may pass the limits.

    Returns:
        None where nodes were no masks, which cannot be measured.
    """
    if losses.missed is None:
        return None
    after = losses.after
    missed = losses.missed[:, :, after].astype(np.float64)
    excess = losses.groups.astype(np.float64) - losses.full
    broken = excess[:, :, after].mean(axis=2) > -log(quality)
    placed = losses.placement("loss")[None] == np.arange(len(names))[:, None]
    levels = [(_mean(missed[g][placed[g]]), _mean(missed[g][broken[g]])) for g in range(len(names))]
    references = [
        normal + _LEVEL * (wrong - normal) if normal is not None and wrong is not None and wrong > normal else None
        for normal, wrong in levels
    ]
    peaks = [
        evidence(missed[g][placed[g]], reference).max(axis=1)
        for g, reference in enumerate(references)
        if reference is not None
    ]
    highest = np.concatenate(peaks) if peaks else np.zeros(1)
    threshold = float(np.quantile(highest, 1 - rate))
    nodes = [
        NodeAlarm(name, normal, wrong, None if reference is None else Limits(reference, threshold))
        for name, (normal, wrong), reference in zip(names, levels, references, strict=True)
    ]
    return Alarms(quality, float((highest > threshold).mean()), _relation(losses.missed, excess), nodes)


def _mean(windows: Doubles) -> float | None:
    return float(windows.mean()) if len(windows) >= FEWEST else None


def _relation(missed: Any, excess: Doubles) -> Relation:
    n = missed.shape[2] // PIECE
    size = min(PIECE, missed.shape[2])
    pieces = (slice(None), slice(None), slice(0, max(n, 1) * size))
    x, y = (values[pieces].reshape(-1, size).mean(axis=1, dtype=np.float64) for values in (missed, excess))
    slope, intercept = np.polyfit(x, y, 1) if np.ptp(x) > 0 else (0.0, y.mean())
    spread = x.std() * y.std()
    correlation = float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0
    return Relation(float(intercept), float(slope), float((y - intercept - slope * x).std()), correlation, x.size)


def alarms_to_json(alarms: Alarms) -> dict[str, Any]:
    """Return what `alarms_from_json` reads."""
    return asdict(alarms)


def alarms_from_json(value: dict[str, Any], where: str) -> Alarms:
    """Read what `alarms_to_json` wrote; `where` is its place in the file.

    Raises:
        MoeshardError: naming the place of what is missing or wrong.
    """
    relation = take(value, "relation", dict, where)
    found = []
    for index, node in enumerate(take(value, "nodes", list, where)):
        place = f"{where}.nodes[{index}]"
        own = expect(node, dict, place)
        limits = None
        if own.get("limits") is not None:
            given = take(own, "limits", dict, place)
            numbers = (take(given, key, float, f"{place}.limits") for key in ("reference", "threshold"))
            limits = Limits(*numbers)
        normal, broken = (
            None if own.get(key) is None else take(own, key, float, place) for key in ("normal", "broken")
        )
        found.append(NodeAlarm(take(own, "name", str, place), normal, broken, limits))
    return Alarms(
        take(value, "quality", float, where),
        take(value, "looked_at", float, where),
        Relation(
            take(relation, "intercept", float, f"{where}.relation"),
            take(relation, "slope", float, f"{where}.relation"),
            take(relation, "scatter", float, f"{where}.relation"),
            take(relation, "correlation", float, f"{where}.relation"),
            take(relation, "n", int, f"{where}.relation"),
        ),
        found,
    )
