"""Who may ask: API keys."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from moeshard._core import MoeshardError
from moeshard.serving.errors import unauthorized

KEY_VARIABLE = "MOESHARD_API_KEY"
SCOPE_HEADER = "x-moeshard-scope"


class Keys:
    """The keys that are accepted; none: everybody may ask."""

    def __init__(self, keys: Iterable[str]):
        # Only digests are kept: what a log or a memory dump shows opens nothing.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def scope(self, headers: Mapping[str, str]) -> str:
        """Return the name of who asks: of its key the digest's first digits, which logs may show.

        Raises:
            ApiError: 401.
        """
        if not self._digests:
            return ""
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not given:
            raise unauthorized("This server wants an API key: Authorization: Bearer KEY, or x-api-key: KEY.")
        digest = hashlib.sha256(given.encode("utf-8", errors="surrogateescape")).digest()
        # All are looked at, each in constant time: how long it takes says nothing about any of them.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise unauthorized("The API key is not known here.")
        return digest.hex()[:16]


def scope_of(keys: Keys, headers: Mapping[str, str]) -> str:
    """Return who asks, as far as what is remembered of prompts goes: a gateway says for whom it asks.

    Whoever says so parts what is its own, and gets at nothing that is another key's.

    Raises:
        ApiError: 401.
    """
    told = headers.get(SCOPE_HEADER, "")
    return keys.scope(headers) + (f"/{hashlib.sha256(told.encode()).hexdigest()[:16]}" if told else "")


def read_keys(path: str | os.PathLike[str] | None) -> Keys:
    """Return the keys in a file, one a line ('#' begins a comment), and those in ``MOESHARD_API_KEY``, between commas.

    Raises:
        MoeshardError: the file cannot be read, or holds no key.
    """
    keys = [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",")]
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MoeshardError(f"{os.fspath(path)}: cannot read the API keys: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise MoeshardError(f"{os.fspath(path)}: holds no API key; write one on each line")
        keys += found
    return Keys(key for key in keys if key)
