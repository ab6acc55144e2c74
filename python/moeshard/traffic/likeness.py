"""How the text that a plan is judged on relates to the text that its experts were chosen by.

It should be other text of the same kinds: on the very text that experts were chosen by, or on nearly the same, less is
lost than on any other, and what is lost on other kinds says nothing about the kinds that were meant. Domains are known
by their names and digests; text that is nearly the same by a sketch of it, which profiles and plans carry.

A sketch is made of the hashes of all runs of 32 bytes, small and capital letters and all white space being equal: the
smallest of them, as many as fit (Broder, On the resemblance and containment of documents, 1997). Of another text's
hashes as small as these, the share that is among them is about the share of its runs that stand in the first text.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard.files.documents import expect
from moeshard.traffic.domains import Domain, texts_seen
from moeshard.traffic.embedded import embedded_domains, embedded_text

SKETCH = 1024
"""Hashes of a domain: 8 KiB in a file, however long its text."""
NEAR = 0.2
"""Share of a text, from which on it is nearly another one. Different texts of one kind have up to 7 % in common."""

_SHINGLE = 32
_FEWEST = 8
"""Hashes of a text that can be looked for, of fewer of which nothing is said."""
_PIECE = 1 << 20
_HASH_BYTES = 6

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Likeness:
    """What is known of the text that was measured on."""

    seen: list[str] = field(default_factory=list)
    """Domains whose text experts were chosen by."""
    near: dict[str, float] = field(default_factory=dict)
    """Of other domains, the share of their text that stands in that text, where it is much."""
    foreign: list[str] = field(default_factory=list)
    """Domains that experts were not chosen for."""
    missing: list[str] = field(default_factory=list)
    """Domains that experts were chosen for and nothing was measured of."""

    def sentences(self) -> list[str]:
        """Say what a reader of figures must know; nothing where the text is as it should be."""
        said = [
            f"experts were chosen by text '{name}' too: on other text more is lost than on this" for name in self.seen
        ]
        said += [
            f"about {share:.0%} of text '{name}' stands in the text that experts were chosen by: on other text more is "
            f"lost than on this"
            for name, share in self.near.items()
        ]
        if self.foreign:
            said.append(
                f"experts were not chosen for {', '.join(self.foreign)}: what is lost there says nothing about the "
                f"traffic that they were chosen for"
            )
        if self.missing:
            said.append(
                f"experts were chosen for {', '.join(self.missing)}, of which nothing is measured here; give other "
                f"text of that kind (--text NAME=FILE)"
            )
        return said


def likeness(domains: Sequence[Domain], texts: object, sketches: object) -> Likeness:
    """Compare domains to be measured on with those that experts were chosen by.

    Args:
        domains: to be measured on.
        texts: digests by domain, which profiles have among their facts and plans among their parameters; anything else
            says nothing.
        sketches: of `sketch`, by domain, which profiles have among their facts and plans beside their parameters;
            anything else says nothing.
    """
    if not isinstance(texts, dict) or not texts:
        return Likeness()
    seen = texts_seen(domains, texts)
    near = {}
    for domain in domains:
        shares = [_overlap(domain, known) for known in sketches.values()] if isinstance(sketches, dict) else []
        if domain.name not in seen and max(shares, default=0) >= NEAR:
            near[domain.name] = max(shares)
    kin = [domain.name for domain in domains if domain.name in seen or _is_kin(domain, texts)]
    digests = {domain.digest for domain in domains}
    return Likeness(
        seen=seen,
        near=near,
        foreign=[domain.name for domain in domains if domain.name not in kin and domain.name not in near],
        missing=[name for name, digest in texts.items() if name not in kin and digest not in digests],
    )


def likeness_from_json(value: Mapping[str, Any], where: str) -> Likeness:
    """Read a likeness from among other keys of an object; older files lack some of its own.

    Raises MoeshardError, with the place of what is wrong.
    """
    lists = {}
    for key in ("seen", "foreign", "missing"):
        names = expect(value.get(key, []), list, f"{where}.{key}")
        lists[key] = [expect(name, str, f"{where}.{key}[{index}]") for index, name in enumerate(names)]
    near = expect(value.get("near", {}), dict, f"{where}.near")
    return Likeness(near={name: expect(share, float, f"{where}.near.{name}") for name, share in near.items()}, **lists)


def _is_kin(domain: Domain, texts: Mapping[str, Any]) -> bool:
    """Whether experts were chosen for this kind of text: by its name, and for embedded text by what that names."""
    if domain.name not in texts:
        return False
    name = domain.name
    if name in embedded_domains() and domain == Domain(name, (embedded_text(name, "heldout"),)):
        return bool(texts[name] == Domain(name, (embedded_text(name, "calibration"),)).digest)
    return True


def sketch(domain: Domain) -> str:
    """Return the sketch of a domain's text, base64."""
    smallest = np.zeros(0, dtype=np.uint64)
    for hashes in _hashes(domain):
        if smallest.size == SKETCH:
            hashes = hashes[hashes < smallest[-1]]
        smallest = np.unique(np.concatenate([smallest, hashes]))[:SKETCH]
    as_bytes = smallest.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - _HASH_BYTES :]
    return base64.b64encode(as_bytes.tobytes()).decode()


def _overlap(domain: Domain, sketched: object) -> float:
    """The share of a domain's text that stands in a sketched one; 0 where too little of it can be looked for."""
    known = _read(sketched)
    largest = known[-1] if known.size == SKETCH else np.uint64(2 ** (8 * _HASH_BYTES) - 1)
    own = np.unique(np.concatenate([np.zeros(0, np.uint64), *(h[h <= largest] for h in _hashes(domain))]))
    return float(np.isin(own, known).mean()) if own.size >= _FEWEST and known.size else 0.0


def _read(sketched: object) -> _Hashes:
    """Hashes, ascending; none where it is no sketch: facts are free, another tool may have written anything."""
    try:
        data = base64.b64decode(sketched, validate=True) if isinstance(sketched, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    rows = np.frombuffer(data[: len(data) // _HASH_BYTES * _HASH_BYTES], dtype=np.uint8).reshape(-1, _HASH_BYTES)
    wide = np.zeros((len(rows), 8), dtype=np.uint8)
    wide[:, 8 - _HASH_BYTES :] = rows
    return np.unique(wide.view(">u8").ravel().astype(np.uint64))


def _hashes(domain: Domain) -> Iterator[_Hashes]:
    """Hashes of the runs of each text, piece by piece: memory does not grow with it."""
    for text in domain.texts:
        data = " ".join(text.casefold().split()).encode("utf-8", "surrogatepass")
        for at in range(0, max(1, len(data) - _SHINGLE + 1), _PIECE):
            yield _rolled(np.frombuffer(data[at : at + _PIECE + _SHINGLE - 1], dtype=np.uint8))


def _rolled(data: npt.NDArray[np.uint8]) -> _Hashes:
    """Hash every run of bytes at once: those of twice as many follow from two of half as many."""
    if data.size < _SHINGLE:
        return np.zeros(0, dtype=np.uint64)
    # Any odd factors do; they are part of the format of a sketch.
    factor = 0x9E3779B97F4A7C15
    hashes: _Hashes = (data.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    width = 1
    while width < _SHINGLE:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        factor = factor * factor % 2**64
        width *= 2
    hashes ^= hashes >> np.uint64(31)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(29)
    return hashes >> np.uint64(64 - 8 * _HASH_BYTES)
