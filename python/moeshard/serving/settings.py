"""How the server behaves towards the outside."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from moeshard.serving.auth import Keys

Access = Literal["off", "key", "public"]


@dataclass(frozen=True)
class Settings:
    """What `moeshard.serving.app.build` is told."""

    keys: Keys = field(default_factory=lambda: Keys(()))
    """Who may ask; none: everybody."""
    hosts: Collection[str] | None = None
    """Names by which the server may be called; None: any."""
    max_body: int = 8 * 2**20
    """Bytes of a request."""
    ping_seconds: float = 5.0
    """A stream that is silent for so long says that it is alive."""
    metrics: Access = "key"
    """Who may read /metrics, where there are keys."""
    resume: bool = False
    """Whether an answer whose node fails half-way is continued by the whole model, where the request does not say."""
    page: bool = True
    """Whether there is a page at /."""
