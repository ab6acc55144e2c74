"""Options that `moeshard serve` and `moeshard gateway` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moeshard.placement.meter import Limits
    from moeshard.planning.plan import Plan

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


EvaluationOption = Annotated[
    Path | None,
    typer.Option(
        help="What `moeshard evaluate -o` wrote of the plan: sessions whose node misses too much by it are placed "
        "again while they are answered. Without it they stay where they are placed."
    ),
]


def read_limits(path: Path, plan: Plan | None) -> dict[str, Limits]:
    """Return what an evaluation learned of a plan's nodes.

    Raises:
        MoeshardError: it is of another plan or model, or learned nothing.
    """
    from moeshard import MoeshardError
    from moeshard.evaluation.record import read_evaluation
    from moeshard.gguf.fingerprint import same_fingerprint

    if plan is None:
        raise typer.BadParameter("it is of a plan's nodes; give --plan too", param_hint="--evaluation")
    found = read_evaluation(path)
    names = [node.name for node in plan.nodes]
    same = same_fingerprint(found.model.fingerprint, plan.model.fingerprint)
    if [group.name for group in found.groups] != names or not same or found.parameters != plan.parameters:
        raise MoeshardError(f"{path}: is of another plan; evaluate this one with moeshard evaluate --plan")
    limits = found.alarms.limits() if found.alarms is not None else {}
    if not limits:
        raise MoeshardError(
            f"{path}: says nothing of what nodes miss; evaluate the plan again, without --shards and with more windows"
        )
    return limits


def check_metrics(metrics: str) -> None:
    """Refuse what is none of the values of `MetricsOption`."""
    if metrics not in ("key", "public", "off"):
        raise typer.BadParameter("choose key, public or off", param_hint="--metrics")


def allowed_hosts(host: str, allowed: list[str] | None) -> set[str]:
    """Return the names that a server without API keys may be called by."""
    return {"localhost", host, *(allowed or ())}


def open_to_all(host: str) -> str:
    """Warn of a server without API keys that others can reach."""
    return f"everybody who reaches {host} can use this server; give it API keys (--api-key-file)"


def how_to_reach(address: str) -> str:
    """Say where clients and people find a server."""
    return f"OpenAI's clients: base_url {address}/v1; a page to try it: {address}/"
