"""Options that `moeshard serve` and `moeshard gateway` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HostOption = Annotated[str, typer.Option(help="The address to listen on.")]

PortOption = Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any free one.")]

MinQualityOption = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Give a session to the whole model where that one's perplexity on the first turn, divided by the best "
        "node's, is lower; 0: never.",
    ),
]

TimeoutOption = Annotated[float, typer.Option(min=1.0, help="Seconds until an answer is given up.")]

ApiKeyFileOption = Annotated[
    Path | None, typer.Option(help="API keys, one a line; those in MOESHARD_API_KEY count too.")
]

AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A name that a server without API keys may be called by, beside localhost."),
]

MetricsOption = Annotated[
    str, typer.Option(help="Who may read /metrics: key (who has an API key), public, or off (nobody).")
]


def check_metrics(metrics: str) -> None:
    """Refuse what is none of the values of `MetricsOption`."""
    if metrics not in ("key", "public", "off"):
        raise typer.BadParameter("choose key, public or off", param_hint="--metrics")
