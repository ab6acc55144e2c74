"""What made a file: kept in it, for who reads it later."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

MADE = "made"
"""Under this key, in what a file says beside its figures."""


def stamp(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the time, the version of moeshard, and the command (its words) where there was one."""
    found = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "moeshard": version("moeshard")}
    return found if command is None else {**found, "command": shlex.join(["moeshard", *command])}
