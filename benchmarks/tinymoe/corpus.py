"""`python -m tinymoe corpus`: from Debian packages to token files, calibration and held-out texts.

Everything lands under one work directory: `debs/`, `x/` (unpacked), `calibration/*.txt`, `heldout/*.txt`,
`tokenizer.json`, `train/*.bin` (little-endian uint16 token ids) and `corpus.json` (what was made of what).
"""

from __future__ import annotations

import json
import random
import subprocess
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .readers import READERS
from .sources import DOMAINS, MAX_CHARS, SOURCES, packages
from .tokens import EOT, train_tokenizer

#: Bytes of calibration and of held-out text per domain, and the most one document gives to either.
TEXT_BYTES = 128 * 1024
SLICE_CHARS = 9_000

#: A document is a duplicate when this share of its word shingles was seen before.
DUPLICATE_SHARE = 0.5
#: A training document may share at most this part of its shingles with calibration and held-out text, not
#: counting boilerplate: shingles that more than `BOILERPLATE` documents hold.
LEAK_SHARE = 0.1
BOILERPLATE = 8
#: A document counts as part of an excluded text from this many shared rare (in at most 3 documents) shingles.
EXCLUDE_SHINGLES = 4

_WORDS = 8

#: Frequent words that tell a translation from an untranslated page.
_COMMON = {
    "en": {"the", "and", "of", "is", "that"},
    "de": {"der", "die", "und", "das", "nicht", "wird", "ist"},
    "fr": {"le", "les", "des", "est", "une", "pour", "dans"},
    "es": {"el", "los", "del", "una", "que", "para", "por"},
}


@dataclass
class Document:
    """One document: its text in pieces, where it came from, its hashed word shingles."""

    origin: str
    pieces: list[str]
    embed: bool
    shingles: set[int]


def shingles(text: str) -> set[int]:
    """Hashes of all runs of 8 words; one in four is kept (by hash, so the same ones everywhere)."""
    words = text.split()
    runs = (" ".join(words[i : i + _WORDS]).encode() for i in range(len(words) - _WORDS + 1))
    return {h for h in map(zlib.crc32, runs) if h % 4 == 0}


def fetch(work: Path) -> None:
    """Download and unpack every package that is not there yet (needs apt and dpkg-deb)."""
    debs, unpacked = work / "debs", work / "x"
    debs.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(exist_ok=True)
    have = {p.name.split("_")[0] for p in debs.glob("*.deb")}
    missing = [p for p in packages() if p not in have]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=debs, check=True)
    for deb in sorted(debs.glob("*.deb")):
        target = unpacked / deb.name.split("_")[0]
        if not target.exists():
            subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], check=True)


def _is_in_language(domain: str, text: str) -> bool:
    """False for a page of `domain` whose words are mostly another language's (an untranslated page)."""
    if domain not in ("de", "fr", "es"):
        return True
    counts = Counter(text.lower().split())
    own = sum(counts[w] for w in _COMMON[domain])
    return own > 2 * sum(counts[w] for w in _COMMON["en"])


def read_domain(work: Path, domain: str) -> list[Document]:
    """All documents of one domain, each once, shuffled (seeded by the domain's name)."""
    found: list[Document] = []
    for source in SOURCES:
        if source.domain != domain:
            continue
        root = work / "x" / source.package
        for path in sorted({p for pattern in source.patterns for p in root.glob(pattern) if p.is_file()}):
            pieces = [p for p in READERS[source.reader](path) if len(p) >= 200 and _is_in_language(domain, p)]
            groups = [[p] for p in pieces] if source.one_document_per_piece else [pieces] * bool(pieces)
            origin = f"{source.package}:{path.relative_to(root)}"
            found += [Document(origin, g, source.embed, shingles("\n".join(g))) for g in groups]
    random.Random(domain).shuffle(found)
    seen: set[int] = set()
    unique = []
    for document in found:
        if len(document.shingles & seen) <= DUPLICATE_SHARE * len(document.shingles):
            unique.append(document)
        seen |= document.shingles
    return unique


def is_part_of(document: Document, excluded: set[int], frequency: Counter[int]) -> bool:
    """Whether `document` holds passages of the excluded texts (a few rare shingles in common are enough)."""
    return sum(frequency[h] <= 3 for h in document.shingles & excluded) >= EXCLUDE_SHINGLES


def take_text(documents: list[Document], rng: random.Random) -> tuple[str, list[Document]]:
    """TEXT_BYTES of text made of slices of whole documents, and the documents it was taken from."""
    text, used = b"", []
    for document in documents:
        if len(text) >= TEXT_BYTES:
            break
        piece = rng.choice(document.pieces)
        start = piece.rfind("\n", 0, rng.randrange(max(1, len(piece) - SLICE_CHARS))) + 1
        text += piece[start : start + SLICE_CHARS].strip().encode() + b"\n\n"
        used.append(document)
    return text[:TEXT_BYTES].decode("utf-8", "ignore"), used


def split_domain(documents: list[Document], excluded: set[int], domain: str) -> tuple[dict[str, str], list[Document]]:
    """Calibration and held-out text, and the training documents that share nothing much with either."""
    rng = random.Random("split " + domain)
    frequency = Counter(h for d in documents for h in d.shingles)
    banned = [d for d in documents if is_part_of(d, excluded, frequency)]
    free = [d for d in documents if not is_part_of(d, excluded, frequency)]
    # Documents of the excluded texts cannot be trained on, so they are the first choice for held-out text;
    # at most half, so that held-out text does not consist of them alone.
    rng.shuffle(banned)
    chosen = [d for d in banned if d.embed][: TEXT_BYTES // SLICE_CHARS // 2]
    heldout, used = take_text(chosen + [d for d in free if d.embed], rng)
    taken = {id(d) for d in used}
    calibration, used = take_text([d for d in free if d.embed and id(d) not in taken], rng)
    taken |= {id(d) for d in used}
    private = {h for h in shingles(heldout) | shingles(calibration) if frequency[h] <= BOILERPLATE}
    train, size = [], 0
    for d in free:
        if id(d) in taken or len(d.shingles & private) > LEAK_SHARE * len(d.shingles):
            continue
        if size < MAX_CHARS[domain]:
            train.append(d)
            size += sum(map(len, d.pieces))
    return {"calibration": calibration, "heldout": heldout}, train


def encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """Token ids (uint16) of all documents, each after an end-of-text token."""
    eot = tokenizer.token_to_id(EOT)
    out: list[np.ndarray] = []
    for document in documents:
        for encoding in tokenizer.encode_batch(document.pieces):
            out.append(np.array([eot, *encoding.ids], dtype=np.uint16))
    return np.concatenate(out)


def build(work: Path, vocabulary: int, exclude: Path | None, tokenizer_file: Path | None) -> None:
    """The whole corpus; `exclude` is a folder of NAME.txt whose documents must not be trained on."""
    fetch(work)
    train: dict[str, list[Document]] = {}
    report: dict[str, dict[str, object]] = {}
    for domain in DOMAINS:
        documents = read_domain(work, domain)
        file = exclude / f"{domain}.txt" if exclude else None
        excluded = shingles(file.read_text(errors="ignore")) if file and file.exists() else set()
        texts, train[domain] = split_domain(documents, excluded, domain)
        for kind, text in texts.items():
            (work / kind).mkdir(exist_ok=True)
            (work / kind / f"{domain}.txt").write_text(text)
        report[domain] = {
            "documents": len(documents),
            "train_documents": len(train[domain]),
            "train_bytes": sum(len(p.encode()) for d in train[domain] for p in d.pieces),
        }
        print(domain, report[domain], flush=True)
    if tokenizer_file:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer({k: [p for d in v for p in d.pieces] for k, v in train.items()}, vocabulary)
    tokenizer.save(str(work / "tokenizer.json"))
    (work / "train").mkdir(exist_ok=True)
    for domain in DOMAINS:
        ids = encode(tokenizer, train[domain])
        ids.tofile(work / "train" / f"{domain}.bin")
        report[domain]["train_tokens"] = len(ids)
    (work / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
