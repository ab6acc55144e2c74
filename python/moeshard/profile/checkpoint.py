"""What an analysis has measured so far, in a file that grows: each time only what is new is written.

The file is a line that says what it is, then blocks: a kind, the CRC-32 and length of what it holds, and that. The
first block (``head``) says what is measured. A block ``sums`` holds the pairs of one domain so far. A block ``done``
holds the sequences that are new, and where the newest pairs of each domain are. It is written when all else is on the
disk, and only pairs that the last ``done`` names count: a process that is killed leaves what that says, whatever comes
after it. Pairs that are named no more are written over, so that the file holds those of a domain at most twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Counts, Floats
from moeshard.files.atomic import atomic_file
from moeshard.files.documents import parse_document
from moeshard.profile.packed import VALUES, Cells, Room, Sequences, squares, triangle

_MAGIC = b"moeshard: a profile in the making, 1\n"
_BLOCK = struct.Struct("<4sIQ")
"""Kind, CRC-32 and length of what follows."""
_KINDS = (b"head", b"sums", b"done")


@dataclass(frozen=True, eq=False)
class Pairs:
    """What is held of a domain's traffic in M layers of E experts; see `moeshard.profile.record.Profile`."""

    together: Counts
    """int32 (M, E, E)."""
    cosaliency: Floats
    """float32 (M, E, E)."""
    peak: Floats
    """float32 (M, E)."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Sequences that were measured, in the order of the analysis, and the pairs of their domains."""

    sequences: Sequences
    n_tokens: Counts
    """int32 (n,)."""
    entropy: Floats
    """float32 (n, M)."""
    pairs: dict[int, Pairs]
    """By index of the domain, of all of its sequences so far; domains of which nothing is new may be left out."""
    seconds: float
    """What the analysis has taken so far."""


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a `Checkpoint` does. One that cannot be read does not."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):
        return False


class Checkpoint:
    """The file, open to be gone on with."""

    def __init__(self, file: IO[bytes], name: str, found: _Found):
        self._file = file
        self._name = name
        self._live = found.places
        """Where the pairs of each domain are: place and CRC-32."""
        self._free = found.free
        self._end = found.end

    @staticmethod
    def create(path: str | os.PathLike[str], head: Mapping[str, Any], first: Measured | None = None) -> Checkpoint:
        """Begin a file, with what has been measured before; one of this name is replaced when that is written.

        Raises MoeshardError where it cannot be written.
        """
        content = json.dumps(head).encode()
        with atomic_file(path, force=True) as file:
            file.write(_MAGIC + _BLOCK.pack(b"head", zlib.crc32(content), len(content)) + content)
            begun = Checkpoint(file, os.fspath(path), _Found(end=file.tell()))
            if first is not None:
                begun.append(first)
        return Checkpoint._open(begun._name, _Found(places=begun._live, end=begun._end))

    @staticmethod
    def resume(path: str | os.PathLike[str]) -> Checkpoint:
        """Go on with a file that `read_checkpoint` reads.

        Raises MoeshardError where it is damaged, or cannot be read or written.
        """
        name = os.fspath(path)
        with _reading(name) as file:
            found = _scan(file, len(_MAGIC))
        return Checkpoint._open(name, found)

    @staticmethod
    def _open(name: str, found: _Found) -> Checkpoint:
        try:
            # Open until `close`.
            file = open(name, "r+b")  # noqa: SIM115
            file.truncate(found.end)  # what a killed process left unfinished
        except OSError as error:
            raise MoeshardError(f"cannot write '{name}': {error.strerror or error}") from error
        return Checkpoint(file, name, found)

    def append(self, new: Measured) -> None:
        """Add sequences, and replace the pairs of those domains that `new` has.

        Raises MoeshardError where it cannot be written; the file then counts as it was.
        """
        try:
            places = dict(self._live)
            for domain, pairs in new.pairs.items():
                places[domain] = self._write_pairs(_pairs_to_parts(pairs))
            self._flush()
            self._write(self._end, b"done", [_done_to_bytes(new, places)])
            self._flush()
        except OSError as error:
            raise MoeshardError(f"cannot write '{self._name}': {error.strerror or error}") from error
        self._free += [place for domain, (place, _) in self._live.items() if places[domain][0] != place]
        self._live = places

    def _write_pairs(self, parts: Sequence[memoryview]) -> tuple[int, int]:
        place = self._free.pop() if self._free else self._end
        return place, self._write(place, b"sums", parts)

    def _write(self, place: int, kind: bytes, parts: Sequence[bytes | memoryview]) -> int:
        """Write a block, and return the CRC-32 of what it holds."""
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        self._file.seek(place)
        self._file.write(_BLOCK.pack(kind, checksum, sum(memoryview(part).nbytes for part in parts)))
        for part in parts:
            self._file.write(part)
        self._end = max(self._end, self._file.tell())
        return checksum

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Measured | None]:
    """Return the head of a file, and what it holds, if anything.

    Raises MoeshardError where it is damaged, or cannot be read.
    """
    with _reading(os.fspath(path)) as file:
        found = _scan(file, len(_MAGIC))
        return found.head, _measured(file, found)


@dataclass
class _Found:
    """What is where in a file."""

    head: dict[str, Any] = field(default_factory=dict)
    done: list[bytes] = field(default_factory=list)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    end: int = 0


@contextlib.contextmanager
def _reading(name: str) -> Iterator[IO[bytes]]:
    try:
        with open(name, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise MoeshardError(f"{name}: is not what an interrupted analysis left; remove it to begin anew")
            yield file
    except OSError as error:
        raise MoeshardError(f"cannot read '{name}': {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, zipfile.BadZipFile, EOFError) as error:
        raise MoeshardError(f"{name}: is damaged ({error}); remove it to begin anew") from error


def _scan(file: IO[bytes], at: int) -> _Found:
    """Walk over the blocks, up to the first that is not whole."""
    size = os.fstat(file.fileno()).st_size
    found = _Found(end=at)
    sums = []
    while at + _BLOCK.size <= size:
        file.seek(at)
        kind, checksum, length = _BLOCK.unpack(file.read(_BLOCK.size))
        if kind not in _KINDS or at + _BLOCK.size + length > size:
            break
        if kind == b"sums":  # may be half written; whether it is whole matters only where it is named
            sums.append(at)
        else:
            content = file.read(length)
            if zlib.crc32(content) != checksum:
                break
            if kind == b"head":
                found.head = parse_document(content.decode(), "profile in the making")
            else:
                found.done.append(content)
        at += _BLOCK.size + length
        found.end = at
    if not found.head:
        raise ValueError("its head is not whole")
    return found if not found.done else _placed(found, sums)


def _placed(found: _Found, sums: Sequence[int]) -> _Found:
    with np.load(BytesIO(found.done[-1])) as last:
        found.places = {int(domain): (int(place), int(crc)) for domain, place, crc in last["places"]}
    named = {place for place, _ in found.places.values()}
    found.free = [place for place in sums if place not in named]
    return found


def _measured(file: IO[bytes], found: _Found) -> Measured | None:
    pairs = {}
    for domain, (place, checksum) in found.places.items():
        file.seek(place)
        _, _, length = _BLOCK.unpack(file.read(_BLOCK.size))
        content = file.read(length)
        if zlib.crc32(content) != checksum:
            raise ValueError(f"the pairs of domain {domain} are not what was written")
        pairs[domain] = _pairs_from_bytes(content)
    return _done_from_bytes(found.done, pairs) if found.done else None


def _pairs_to_parts(pairs: Pairs) -> list[memoryview]:
    """Of the same length for every domain, so that a place serves any of them."""
    shape = np.array(pairs.peak.shape, dtype="<i8")
    parts = [shape, triangle(pairs.together), triangle(pairs.cosaliency), np.ascontiguousarray(pairs.peak)]
    return [part.reshape(-1).view(np.uint8).data for part in parts]


def _pairs_from_bytes(content: bytes) -> Pairs:
    rows, n_expert = (int(n) for n in np.frombuffer(content, "<i8", 2))
    half = n_expert * (n_expert + 1) // 2
    parts = np.split(np.frombuffer(content, "<i4", offset=16), np.cumsum([rows * half, rows * half]))
    together, cosaliency = (part.reshape(rows, half) for part in parts[:2])
    return Pairs(
        squares(together, n_expert),
        squares(cosaliency.view("<f4"), n_expert),
        parts[2].view("<f4").reshape(rows, n_expert).copy(),
    )


def _done_to_bytes(new: Measured, places: Mapping[int, tuple[int, int]]) -> bytes:
    cells = new.sequences.cells
    arrays: dict[str, npt.NDArray[Any]] = {
        "places": np.array([(domain, *place) for domain, place in places.items()], dtype=np.int64).reshape(-1, 3),
        "seconds": np.array(new.seconds),
        "n_tokens": new.n_tokens,
        "entropy": new.entropy,
        "shape": np.array(cells.shape),
        "bits": cells.bits,
        **new.sequences.values,
        **{f"{name}_scale": scale for name, scale in new.sequences.scales.items()},
    }
    buffer = BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _done_from_bytes(blocks: Sequence[bytes], pairs: dict[int, Pairs]) -> Measured:
    files = [np.load(BytesIO(content)) for content in blocks]
    shapes = [file["shape"].tolist() for file in files]
    counts = [file["count"] for file in files]
    room = Room((sum(n for n, _, _ in shapes), *shapes[0][1:]), sum(count.size for count in counts))
    for file, (_, rows, n_expert), count in zip(files, shapes, counts, strict=True):
        values = {name: count if name == "count" else file[name] for name in VALUES}
        scales = {name: file[f"{name}_scale"] for name in VALUES if f"{name}_scale" in file}
        room.add(Sequences(Cells.of(file["bits"], rows, n_expert), values, scales))
    n_tokens, entropy = (np.concatenate([file[name] for file in files]) for name in ("n_tokens", "entropy"))
    return Measured(room.since(), n_tokens, entropy, pairs, float(files[-1]["seconds"]))
