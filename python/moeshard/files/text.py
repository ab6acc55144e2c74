"""Text that is no text: names of files, and strings of JSON, may hold what no character stands for."""

from __future__ import annotations

import re

from moeshard._core import MoeshardError

# Halves of a pair of UTF-16. Python also writes bytes that are no UTF-8 so (its "surrogate escapes").
_LONE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


def readable(text: str) -> str:
    """Return the text as it can be shown and written: what no character stands for as U+FFFD."""
    return _LONE.sub(REPLACEMENT, text)


def check_text(text: str, what: str) -> str:
    """Return the text.

    Raises:
        MoeshardError: it holds what no character stands for; `what` is named.
    """
    found = _LONE.search(text)
    if found is None:
        return text
    code = ord(found[0])
    is_byte = 0xDC80 <= code <= 0xDCFF
    problem = f"the byte 0x{code - 0xDC00:02x} is no UTF-8" if is_byte else f"half a character (U+{code:04X})"
    raise MoeshardError(f"{what} is not text: at character {found.start()} {problem}; give it in UTF-8")
