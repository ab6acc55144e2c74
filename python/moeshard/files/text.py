"""Text that is no text: names of files, and strings of JSON, may hold what no character stands for."""

from __future__ import annotations

import re
from typing import Any, TypeVar

# Halves of a pair of UTF-16. Python also writes bytes that are no UTF-8 so (its "surrogate escapes").
_LONE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"

_T = TypeVar("_T")


def readable(text: str) -> str:
    """Return the text as it can be shown and written: what no character stands for as U+FFFD."""
    return _LONE.sub(REPLACEMENT, text)


def readable_document(value: _T) -> _T:
    """Return a value of JSON with all its texts `readable`."""
    found: Any = value
    if isinstance(value, str):
        found = readable(value)
    elif isinstance(value, list):
        found = [readable_document(item) for item in value]
    elif isinstance(value, dict):
        found = {readable(key): readable_document(item) for key, item in value.items()}
    result: _T = found
    return result
