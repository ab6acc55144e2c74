"""What a server does for other servers: gateways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeshard.serving.probing import LocalProber
from moeshard.serving.rendering import Renderer


@dataclass(frozen=True, eq=False)
class Inner:
    """Asked for under /moeshard/ and in /props."""

    prober: LocalProber
    """Measures what first turns cost."""
    renderer: Renderer
    """Makes tokens of prompts, for nodes of other makes."""
    about: Mapping[str, Any]
    """Which experts are held; see `moeshard.serving.about`."""
