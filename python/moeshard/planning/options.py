"""Options of strategies: which there are, who takes them, and what they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moeshard._core import MoeshardError

ISLANDS = "islands"
SHARED_CORE = "shared-core"


@dataclass(frozen=True)
class Options:
    """Those of a strategy that takes none. Making some raises a `MoeshardError` that names the option."""


@dataclass(frozen=True)
class IslandsOptions(Options):
    """See `moeshard.planning.islands.islands`."""

    restarts: int = 16
    """From so many random beginnings; the best is taken."""
    shrinkage: float = 0.1
    """Share by which a node is drawn toward what all traffic needs."""
    cover: bool = False
    """Every expert lives on some node."""
    seed: int = 0
    """Of the beginnings."""

    def __post_init__(self) -> None:
        _check_number("restarts", self.restarts, 1, whole=True)
        _check_number("shrinkage", self.shrinkage, 0, 1)
        _check_number("seed", self.seed, 0, whole=True)
        if not isinstance(self.cover, bool):
            raise MoeshardError(f"option 'cover': must be true or false, got {self.cover!r}")


@dataclass(frozen=True)
class SharedCoreOptions(Options):
    """See `moeshard.planning.strategies.shared_core`."""

    core: float = 0.5
    """Part of the smallest node that is the same everywhere."""

    def __post_init__(self) -> None:
        _check_number("core", self.core, 0, 1)


OPTIONS: dict[str, type[Options]] = {ISLANDS: IslandsOptions, SHARED_CORE: SharedCoreOptions}
"""By strategy; those that are not here take none."""


def options_of(strategy: str, given: Mapping[str, Any]) -> Options:
    """Return the options of a strategy, with defaults for those that are not given.

    Raises:
        MoeshardError: an option is of other strategies, is none at all, or is out of range; it says who takes it, or
            what it may be.
    """
    kind = OPTIONS.get(strategy, Options)
    own = [field.name for field in fields(kind)]
    for name in given:
        if name in own:
            continue
        takers = [other for other, theirs in OPTIONS.items() if name in {field.name for field in fields(theirs)}]
        takes = f"'{strategy}' takes {', '.join(own)}" if own else f"'{strategy}' takes no options"
        if takers:
            raise MoeshardError(f"option '{name}' is of strategy {', '.join(takers)}; {takes}")
        raise MoeshardError(f"there is no option '{name}'; strategy {takes}")
    return kind(**given)


def check_cover(sizes: Sequence[int], n_expert: int) -> None:
    """Raise a `MoeshardError` where nodes of these sizes have no room for all experts together."""
    if sum(sizes) < n_expert:
        raise MoeshardError(
            f"option 'cover': {len(sizes)} {'node has' if len(sizes) == 1 else 'nodes have'} room for {sum(sizes)} "
            f"experts per layer together, fewer than the {n_expert} that are to live on some node; give more room, or "
            f"leave it out"
        )


def _check_number(name: str, value: object, least: float, most: float | None = None, *, whole: bool = False) -> None:
    kind = int if whole else (int, float)
    right = isinstance(value, kind) and not isinstance(value, bool)
    # A comparison with NaN is false.
    if not (right and least <= value and (most is None or value <= most)):  # type: ignore[operator]
        what = "a whole number" if whole else "a number"
        bounds = f"of at least {least:g}" if most is None else f"from {least:g} to {most:g}"
        raise MoeshardError(f"option '{name}': must be {what} {bounds}, got {value!r}")
