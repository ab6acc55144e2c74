"""A profile while it is measured: it grows batch by batch, and what it has is kept in a file now and then."""

from __future__ import annotations

import os
import time

import numpy as np

from moeshard._core import MoeshardError
from moeshard.profile.checkpoint import Checkpoint, Measured, Pairs, is_checkpoint
from moeshard.profile.packed import VALUES, Room, first, pack, packed, rounded
from moeshard.profile.record import Profile, checkpoint_head, read_profile
from moeshard.runtime.session import Statistics


class Growth:
    """The first `n` sequences of a profile have been measured.

    Its arrays (S, M, E) are empty until `finish`; all others are up to date.
    """

    def __init__(self, profile: Profile):
        self.profile = profile
        self._room = Room(profile.count.shape)
        self._kept = 0
        """Sequences that a file holds."""
        self._changed: set[int] = set()
        """Domains of the others."""

    @property
    def n(self) -> int:
        return self._room.n

    @staticmethod
    def resume(path: str | os.PathLike[str], wanted: Profile) -> Growth:
        """Go on from what lies in a file, if it is of the same analysis as the empty profile `wanted`.

        Raises MoeshardError where it is not, or cannot be read.
        """
        found = read_profile(path)
        n = int((found.n_tokens > 0).sum())
        same = (
            found.model.is_same(wanted.model)
            and found.count.shape == wanted.count.shape
            and found.domains == wanted.domains
            and np.array_equal(found.domain, wanted.domain)
            and np.array_equal(found.layers, wanted.layers)
            and {**found.facts, "seconds": 0} == {**wanted.facts, "seconds": 0}
            and bool((found.n_tokens[:n] > 0).all())
        )
        if not same:
            raise MoeshardError(
                f"{os.fspath(path)}: is of an analysis of another model or with other options; remove it to begin anew"
            )
        growth = Growth(found)
        growth._room.add(first(packed({name: getattr(found, name) for name in VALUES}), n))
        growth._kept = n
        for name in VALUES:
            setattr(found, name, getattr(wanted, name))
        return growth

    def add(self, n_tokens: list[int], domain: int, sums: Statistics) -> None:
        """Enter one batch, the next sequences, all of one domain; in `sums` they are numbered from 0."""
        assert sums.together is not None and sums.cosaliency is not None
        rows, new = slice(0, len(n_tokens)), slice(self.n, self.n + len(n_tokens))
        profile = self.profile
        self._room.add(pack({name: getattr(sums, name)[rows] for name in VALUES}))
        profile.n_tokens[new] = n_tokens
        profile.entropy[new] = sums.entropy[rows]
        np.maximum(profile.peak[domain], sums.peak, out=profile.peak[domain])
        profile.together[domain] += sums.together
        profile.cosaliency[domain] += sums.cosaliency
        self._changed.add(domain)

    def unsaved(self) -> Measured | None:
        """Return what was added since this was called last."""
        return self._since(self._kept, self._changed)

    def everything(self) -> Measured | None:
        """Return all that was measured."""
        return self._since(0, set(self.profile.domain[: self.n].tolist()))

    def _since(self, first: int, domains: set[int]) -> Measured | None:
        if first == self.n:
            return None
        self._kept, self._changed = self.n, set()
        profile = self.profile
        own = slice(first, self.n)
        pairs = {d: Pairs(profile.together[d], profile.cosaliency[d], profile.peak[d]) for d in sorted(domains)}
        seconds = profile.facts.get("seconds", 0.0)
        return Measured(self._room.since(first), profile.n_tokens[own], profile.entropy[own], pairs, seconds)

    def finish(self) -> Profile:
        """Return the profile, exactly as a file of it holds it."""
        sequences = self._room.since()
        for name in VALUES:
            setattr(self.profile, name, sequences.array(name))
        rounded(self.profile.cosaliency)
        return self.profile


class Keeper:
    """Keeps what a growing profile has in a file."""

    def __init__(self, growth: Growth, path: str | os.PathLike[str], *, resumed: bool):
        self._growth = growth
        if resumed and is_checkpoint(path):
            self._file = Checkpoint.resume(path)
        else:  # of an older version, too
            self._file = Checkpoint.create(path, checkpoint_head(growth.profile), growth.everything())

    def keep(self) -> float:
        """Write what is new; return how many seconds that took.

        Raises MoeshardError where it cannot be written.
        """
        started = time.monotonic()
        new = self._growth.unsaved()
        if new is not None:
            self._file.append(new)
        return time.monotonic() - started

    def close(self) -> None:
        self._file.close()
