"""Bytes as people read them."""

from __future__ import annotations


def size(n_bytes: float) -> str:
    """Write bytes in the largest unit that leaves a number of at least one: ``17.3 GiB``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.{1 if n_bytes < 100 * factor else 0}f} {unit}"
    return f"{n_bytes:.0f} B"
