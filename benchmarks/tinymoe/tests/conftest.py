"""Shared parts of the pipeline's tests. Run them from `benchmarks/`: `python -m pytest tinymoe/tests`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

TEXT = {
    "en": "The server answers every request.  It keeps a list of peers, and it's polled twice.\n" * 40,
    "de": "Größere Änderungen müssen übersetzt werden; „später“ heißt: über Nacht.\n\n" * 40,
    "py": "def f(x: int) -> int:\n    if x > 0:\n        return x ** 2\n\treturn 0  # tabs\n\n\n" * 40,
}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real byte-level BPE, learned from the texts above."""
    from tinymoe.tokens import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer({k: [v] for k, v in TEXT.items()}, 512).save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file))
