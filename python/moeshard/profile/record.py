"""Profiles: what each expert did for some traffic, kept per sequence so that any strategy can be computed later."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Counts, Doubles, Floats
from moeshard.files.atomic import write_atomically
from moeshard.files.documents import check_version, expect, parse_document, parse_named, take
from moeshard.gguf.identity import ModelIdentity, model_from_json, model_to_json

VERSION = 2
_KEY = "moeshard_profile"
RANKINGS = ("saliency", "mass", "count", "reap")
"""What `Profile.scores` ranks by."""


@dataclass(eq=False)
class Profile:
    """Routing statistics of S sequences of text in D domains, over the M layers of a model that were looked at.

    Sums are over the tokens of a sequence. E is the number of experts of the model, a token's *weight* of an expert
    what its output is multiplied by, *norm* the L2 norm of that output before, and its *contribution* weight · norm.
    """

    model: ModelIdentity
    domains: list[str]
    layers: Counts
    """int32 (M,): layers of the model, ascending."""
    domain: Counts
    """int32 (S,): index of each sequence's domain."""
    n_tokens: Counts
    """int32 (S,): tokens of each sequence; 0 for one that was not reached."""
    count: Counts
    """int32 (S, M, E): tokens that chose the expert."""
    mass: Floats
    """float32 (S, M, E): sum of the expert's weights."""
    saliency: Floats
    """float32 (S, M, E): sum of contributions, what REAP (arXiv 2510.13999) ranks by, before its mean."""
    energy: Floats
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
        head = {
            _KEY: VERSION,
            "model": model_to_json(self.model),
            "domains": self.domains,
            "facts": self.facts,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        # Under that name others look for one score per expert.
        arrays["saliency_by_sequence"] = arrays.pop("saliency")
        buffer = BytesIO()
        np.savez_compressed(buffer, head=np.array(json.dumps(head)), saliency=self.ranking(), **arrays)
        write_atomically(path, buffer.getvalue(), force=force)


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
    """Read what `Profile.save` wrote.

    Raises:
        MoeshardError: the file is missing, damaged or no profile; it names what is wrong.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as archive:
            if not zipfile.is_zipfile(archive):  # numpy would speak of pickles
                raise MoeshardError(f"{name}: is not a profile, or it is damaged; `moeshard analyze` makes one")
        with np.load(name, allow_pickle=False) as file:
            if "head" not in file or "saliency_by_sequence" not in file:
                raise MoeshardError(f"{name}: is not a profile; `moeshard analyze` makes one")
            model, domains, facts = parse_named(name, "profile", str(file["head"]), _read_head)
            arrays = {key: file["saliency_by_sequence" if key == "saliency" else key] for key in _ARRAYS}
    except OSError as error:
        raise MoeshardError(f"cannot read profile '{name}': {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MoeshardError(f"{name}: is not a profile, or it is damaged: {error}") from error
    profile = Profile(model, domains, facts=facts, **arrays)
    _check_shapes(profile, name)
    return _without_idle_layers(profile)


def _without_idle_layers(profile: Profile) -> Profile:
    """Leave out layers in which no token chose an expert, which older files have: see `Model.computed_layers`."""
    ran = np.flatnonzero(profile.count.any(axis=(0, 2)))
    if ran.size == profile.layers.size or not profile.n_tokens.any():
        return profile
    rows: dict[str, Any] = {
        key: np.take(getattr(profile, key), ran, axis=axes.index("M")) for key, axes in _AXES.items() if "M" in axes
    }
    return replace(profile, **rows)


def _read_head(text: str) -> tuple[ModelIdentity, list[str], dict[str, Any]]:
    head = parse_document(text, "profile")
    check_version(head, _KEY, VERSION, "profile")
    domains = [expect(name, str, f"domains[{index}]") for index, name in enumerate(take(head, "domains", list))]
    if len(set(domains)) < len(domains):
        raise MoeshardError(f"domains: a name stands twice: {', '.join(domains)}")
    return model_from_json(take(head, "model", dict)), domains, take(head, "facts", dict)


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
        if kind == "f" and not np.isfinite(array).all():
            raise MoeshardError(f"{name}: is a damaged profile: '{key}' holds values that are not finite")
    in_range = (
        ((profile.domain >= 0) & (profile.domain < max(sizes["D"], 1))).all()
        and ((profile.layers >= 0) & (profile.layers < profile.model.n_layer)).all()
        and (np.diff(profile.layers) > 0).all()
    )
    if not in_range:
        raise MoeshardError(f"{name}: is a damaged profile: a domain or layer is out of range")
