"""Splitting and cleaning: nothing leaks from held-out text into training, licences go, text stays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tinymoe.corpus import Document, encode, shingles, split_domain
from tinymoe.readers import cut, read_code, read_json, read_man, read_metamath
from tinymoe.tokens import EOT


def prose(seed: int, words: int = 3000) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(str(rng.randrange(5000)) for _ in range(10)) for _ in range(words // 10))


def document(seed: int) -> Document:
    text = prose(seed)
    return Document(str(seed), [text], True, shingles(text))


def test_split_keeps_held_out_text_out_of_training() -> None:
    documents = [document(i) for i in range(80)]
    copy = documents[3].pieces[0] + "\n" + prose(999)  # half of it is document 3
    documents.append(Document("copy", [copy], True, shingles(copy)))
    excluded = shingles(documents[3].pieces[0][5000:9000])
    texts, train = split_domain(documents, excluded, "en")
    assert all(d.origin not in ("3", "copy") for d in train)
    private = shingles(texts["heldout"]) | shingles(texts["calibration"])
    assert train and all(len(d.shingles & private) <= 0.1 * len(d.shingles) for d in train)
    assert not shingles(texts["heldout"]) & shingles(texts["calibration"])
    assert all(len(t.encode()) > 120_000 for t in texts.values())


def test_code_loses_its_licence_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.hpp"
    path.write_text("// Copyright 2001 A. Body\n// Distributed under a License\n\n// Adds.\nint add();\n")
    assert read_code(path) == ["// Adds.\nint add();\n"]
    path = tmp_path / "a.py"
    path.write_text("# Copyright 2001 A. Body\n# All rights reserved\nimport os\n# a comment\nx = 1\n")
    assert read_code(path) == ["import os\n# a comment\nx = 1\n"]


def test_man_page_reads_as_prose(tmp_path: Path) -> None:
    path = tmp_path / "a.1"
    path.write_text('.\\" comment\n.TH A 1\n.SH NAME\na \\- does \\fBthings\\fP\n.PP\nIt\\(aqs \\[lq]so\\[rq].\n')
    assert read_man(path) == ["NAME\na - does things\n\nIt's “so”."]


def test_metamath_proofs_and_credits_go(tmp_path: Path) -> None:
    path = tmp_path / "a.mm"
    path.write_text("$( Identity.  (Contributed by NM, 1-Jan-2000.) $)\n  id $p |- ( ph -> ph ) $= ( a ) ABC $.\n")
    assert read_metamath(path) == ["$( Identity. $)\n  id $p |- ( ph -> ph ) $= ? $.\n"]


def test_json_is_cut_between_entries_and_loses_documentation(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    entries = ", ".join(f'"k{i}": {{"documentation": "<p>x</p>", "type": "{"t" * 200}"}}' for i in range(200))
    path.write_text("{" + entries + "}")
    pieces = read_json(path)
    assert len(pieces) > 2 and not any("documentation" in p for p in pieces)
    assert all(p.lstrip().startswith('"k') for p in pieces[1:])


def test_cut_loses_only_blank_lines() -> None:
    text = "\n\n".join("x" * 700 for _ in range(50))
    pieces = cut(text, 5000)
    assert "\n\n".join(pieces) == text and max(map(len, pieces)) <= 5000


def test_every_document_starts_with_end_of_text(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, [document(1), document(2)])
    assert ids.dtype == np.uint16
    assert int((ids == tokenizer.token_to_id(EOT)).sum()) == 2 and ids[0] == tokenizer.token_to_id(EOT)
