"""Text that is no text: names of files, and strings of JSON, may hold what no character stands for."""

from __future__ import annotations

import re

# Halves of a pair of UTF-16. Python also writes bytes that are no UTF-8 so (its "surrogate escapes").
_LONE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


def readable(text: str) -> str:
    """Return the text as it can be shown and written: what no character stands for as U+FFFD."""
    return _LONE.sub(REPLACEMENT, text)
