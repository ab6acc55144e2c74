"""What tests of the server name: its application, and texts."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette

from moeshard.serving.local import Local
from moeshard.traffic.embedded import embedded_text

DOMAINS = ("de", "en", "py")

Application = Callable[..., tuple[Starlette, Local]]


def held_out(domain: str, n_chars: int = 400, at: int = 0) -> str:
    """Return some text of a domain that the plan was not made from."""
    return embedded_text(domain)[at : at + n_chars]
