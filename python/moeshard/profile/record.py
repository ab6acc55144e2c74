"""Profiles: what each expert did for some traffic, kept per sequence so that any strategy can be computed later."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Counts, Doubles, Floats
from moeshard.files.documents import check_version, expect, parse_document, parse_named, take
from moeshard.gguf.identity import ModelIdentity, model_from_json, model_to_json
from moeshard.profile.archive import VERSION, from_archive, write_archive
from moeshard.profile.checkpoint import Measured, is_checkpoint, read_checkpoint
from moeshard.profile.packed import VALUES, Packed, extended, nothing

_KEY = "moeshard_profile"
RANKINGS = ("saliency", "mass", "count", "reap")
"""What `Profile.scores` ranks by."""


@dataclass(eq=False)
class Profile:
    """Routing statistics of S sequences of text in D domains, over the M layers of a model that were looked at.

    Sums are over the tokens of a sequence. E is the number of experts of the model, a token's *weight* of an expert
    what its output is multiplied by, *norm* the L2 norm of that output before, and its *contribution* weight · norm.

    A profile that `analyze` or `read_profile` returns holds the arrays (S, M, E) packed, each value as a float16 in
    units of its row's (see `moeshard.profile.packed`). They are read as any array; to look at some sequences only, say
    so first: ``profile.saliency[sequences]``.
    """

    model: ModelIdentity
    domains: list[str]
    layers: Counts
    """int32 (M,): layers of the model, ascending."""
    domain: Counts
    """int32 (S,): index of each sequence's domain."""
    n_tokens: Counts
    """int32 (S,): tokens of each sequence; 0 for one that was not reached."""
    count: Counts | Packed
    """int32 (S, M, E): tokens that chose the expert."""
    mass: Floats | Packed
    """float32 (S, M, E): sum of the expert's weights."""
    saliency: Floats | Packed
    """float32 (S, M, E): sum of contributions, what REAP (arXiv 2510.13999) ranks by, before its mean."""
    energy: Floats | Packed
    """float32 (S, M, E): sum of the squares of contributions."""
    entropy: Floats
    """float32 (S, M): sum of the entropies of the router's distribution, nats."""
    peak: Floats
    """float32 (D, M, E): the largest norm; a few "super experts" (arXiv 2507.23279) stand out by far."""
    together: Counts
    """int32 (D, M, E, E): tokens that chose both experts; the diagonal is how many chose the one."""
    cosaliency: Floats
    """float32 (D, M, E, E): sum over tokens of the product of both experts' contributions; the diagonal is the sum of
    `energy`. What a token would lose by experts that are dropped together; see `moeshard.planning.cosaliency`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """How the profile was made: JSON values."""

    @property
    def n_expert(self) -> int:
        return self.model.n_expert

    def select(self, domains: Sequence[str] | None = None) -> npt.NDArray[np.bool_]:
        """Return bool (S,): the sequences that were measured, of these domains (None: all).

        Raises MoeshardError for a domain that the profile does not have.
        """
        chosen: npt.NDArray[np.bool_] = self.n_tokens > 0
        if domains is None:
            return chosen
        for name in domains:
            if name not in self.domains:
                raise MoeshardError(f"the profile has no domain '{name}'; it has {', '.join(self.domains)}")
        wanted = [self.domains.index(name) for name in domains]
        return chosen & np.isin(self.domain, wanted)

    def total(self, what: str, domains: Sequence[str] | None = None) -> Doubles:
        """Return float64 (M, E): the sum of ``count``, ``mass`` or ``saliency`` over sequences of these domains.

        Of ``entropy`` float64 (M,). Every domain counts as much as any other, however many of its tokens were seen.
        """
        values = getattr(self, what)
        sums = np.zeros(values.shape[1:])
        for name in self.domains if domains is None else domains:
            chosen = self.select([name])
            tokens = int(self.n_tokens[chosen].sum())
            if tokens:
                sums += values[chosen].sum(axis=0, dtype=np.float64) / tokens
        return sums

    def scores(self, what: str = "saliency", domains: Sequence[str] | None = None) -> Doubles:
        """Return float64 (M, E) to rank the experts of each layer by.

        `what` is ``saliency``, ``mass``, ``count``, or ``reap``: mean of weight · norm over the tokens that chose the
        expert (arXiv 2510.13999).
        """
        if what not in RANKINGS:
            raise MoeshardError(f"unknown ranking '{what}'; choose from {', '.join(RANKINGS)}")
        if what != "reap":
            return self.total(what, domains)
        count = self.total("count", domains)
        scores = self.total("saliency", domains) / np.maximum(count, np.finfo(np.float64).tiny)
        scores[count == 0] = 0
        return scores

    def ranking(self, what: str = "saliency", domains: Sequence[str] | None = None) -> Doubles:
        """Return float64 (n_layer, E): `scores`, with NaN in layers that were not looked at."""
        rows = np.full((self.model.n_layer, self.n_expert), np.nan)
        rows[self.layers] = self.scores(what, domains)
        return rows

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write an ``.npz``; it appears whole or not at all. Its ``saliency`` is what `moeshard.read_ranking` reads.

        Raises MoeshardError where it cannot be written, or exists and `force` is False.
        """
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        write_archive(path, json.dumps(_head_of(self)), self.ranking(), arrays, force=force)


def _head_of(profile: Profile) -> dict[str, Any]:
    return {
        _KEY: VERSION,
        "model": model_to_json(profile.model),
        "domains": profile.domains,
        "facts": profile.facts,
    }


def checkpoint_head(profile: Profile) -> dict[str, Any]:
    """Return the head of a `Checkpoint` of a profile in the making: a JSON object."""
    return {**_head_of(profile), "layers": profile.layers.tolist(), "domain": profile.domain.tolist()}


_ARRAYS = tuple(f.name for f in fields(Profile) if f.name not in ("model", "domains", "facts"))
_AXES = {
    "layers": "M",
    "domain": "S",
    "n_tokens": "S",
    "count": "SME",
    "mass": "SME",
    "saliency": "SME",
    "energy": "SME",
    "entropy": "SM",
    "peak": "DME",
    "together": "DMEE",
    "cosaliency": "DMEE",
}
_FLOATS = ("mass", "saliency", "energy", "entropy", "peak", "cosaliency")


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read what `Profile.save` wrote, in this version of moeshard or an older one.

    Of what an analysis leaves that was interrupted, the profile is that of the sequences that were measured.

    Raises:
        MoeshardError: the file is missing, damaged or no profile; it names what is wrong.
    """
    name = os.fspath(path)
    if is_checkpoint(name):
        return _read_unfinished(name)
    try:
        with open(name, "rb") as archive:
            if not zipfile.is_zipfile(archive):  # numpy would speak of pickles
                raise MoeshardError(f"{name}: is not a profile, or it is damaged; `moeshard analyze` makes one")
        with np.load(name, allow_pickle=False) as file:
            if "head" not in file:
                raise MoeshardError(f"{name}: is not a profile; `moeshard analyze` makes one")
            head = parse_named(name, "profile", str(file["head"]), _read_head)
            arrays = from_archive(file, head.version, head.model.n_expert)
    except OSError as error:
        raise MoeshardError(f"cannot read profile '{name}': {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise MoeshardError(f"{name}: is not a profile, or it is damaged: {error}") from error
    profile = Profile(head.model, head.domains, facts=head.facts, **arrays)
    _check_shapes(profile, name)
    return profile if head.version == VERSION else _without_idle_layers(profile)


def _without_idle_layers(profile: Profile) -> Profile:
    """Leave out layers in which no token chose an expert, which older files have: see `Model.computed_layers`."""
    ran = np.flatnonzero(profile.count.any(axis=(0, 2)))
    if ran.size == profile.layers.size or not profile.n_tokens.any():
        return profile
    rows: dict[str, Any] = {
        key: np.take(getattr(profile, key), ran, axis=axes.index("M")) for key, axes in _AXES.items() if "M" in axes
    }
    return replace(profile, **rows)


def _read_unfinished(name: str) -> Profile:
    document, measured = read_checkpoint(name)
    head = parse_named(name, "profile", json.dumps(document), _read_head)
    layers, domain = (np.array(take(document, key, list), dtype=np.int32) for key in ("layers", "domain"))
    profile = unfinished(head.model, head.domains, layers, domain, measured, head.facts)
    _check_shapes(profile, name)
    return profile


def unfinished(
    model: ModelIdentity,
    domains: list[str],
    layers: Counts,
    domain: Counts,
    measured: Measured | None,
    facts: dict[str, Any],
) -> Profile:
    """Return the profile of an analysis of the sequences of `domain`, of which the first have been measured."""
    s, m, e, d = domain.size, layers.size, model.n_expert, len(domains)
    n_tokens = np.zeros(s, dtype=np.int32)
    entropy = np.zeros((s, m), dtype=np.float32)
    peak = np.zeros((d, m, e), dtype=np.float32)
    together = np.zeros((d, m, e, e), dtype=np.int32)
    cosaliency = np.zeros((d, m, e, e), dtype=np.float32)
    sequences = nothing(s, m, e)
    if measured is not None:
        n = measured.n_tokens.size
        n_tokens[:n], entropy[:n] = measured.n_tokens, measured.entropy
        sequences = extended(measured.sequences, s)
        for index, pairs in measured.pairs.items():
            peak[index], together[index], cosaliency[index] = pairs.peak, pairs.together, pairs.cosaliency
        facts = {**facts, "seconds": measured.seconds}
    return Profile(
        model=model,
        domains=domains,
        layers=layers,
        domain=domain,
        n_tokens=n_tokens,
        **{name: sequences.array(name) for name in VALUES},
        entropy=entropy,
        peak=peak,
        together=together,
        cosaliency=cosaliency,
        facts=facts,
    )


@dataclass(frozen=True)
class _Head:
    version: int
    model: ModelIdentity
    domains: list[str]
    facts: dict[str, Any]


def _read_head(text: str) -> _Head:
    head = parse_document(text, "profile")
    version = check_version(head, _KEY, VERSION, "profile", oldest=1)
    domains = [expect(name, str, f"domains[{index}]") for index, name in enumerate(take(head, "domains", list))]
    if len(set(domains)) < len(domains):
        raise MoeshardError(f"domains: a name stands twice: {', '.join(domains)}")
    return _Head(version, model_from_json(take(head, "model", dict)), domains, take(head, "facts", dict))


def _check_shapes(profile: Profile, name: str) -> None:
    sizes = {
        "S": profile.domain.size,
        "M": profile.layers.size,
        "E": profile.n_expert,
        "D": len(profile.domains),
    }
    for key, axes in _AXES.items():
        array = getattr(profile, key)
        shape = tuple(sizes[axis] for axis in axes)
        kind = "f" if key in _FLOATS else "i"
        if array.shape != shape or array.dtype.kind != kind:
            raise MoeshardError(f"{name}: is a damaged profile: '{key}' is {array.dtype} {array.shape}, not {shape}")
        # What is packed was looked at as it came out of the file.
        if kind == "f" and not isinstance(array, Packed) and not np.isfinite(array).all():
            raise MoeshardError(f"{name}: is a damaged profile: '{key}' holds values that are not finite")
    in_range = (
        ((profile.domain >= 0) & (profile.domain < max(sizes["D"], 1))).all()
        and ((profile.layers >= 0) & (profile.layers < profile.model.n_layer)).all()
        and (np.diff(profile.layers) > 0).all()
    )
    if not in_range:
        raise MoeshardError(f"{name}: is a damaged profile: a domain or layer is out of range")
