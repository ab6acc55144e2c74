"""`moeshard gateway`: one OpenAI-compatible server before the nodes of a plan, each a server of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from moeshard.cli.serving_options import (
    AllowHostOption,
    ApiKeyFileOption,
    EvaluationOption,
    HostOption,
    MetricsOption,
    MinQualityOption,
    PortOption,
    TimeoutOption,
    allowed_hosts,
    check_metrics,
    how_to_reach,
    open_to_all,
    read_limits,
)

NODE_KEY_VARIABLE = "MOESHARD_NODE_API_KEY"


def gateway(
    plan: Annotated[Path, typer.Option(help="What the nodes hold: what `moeshard plan` wrote.", show_default=False)],
    node: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=URL", show_default=False, help="Where a node of the plan is; once for each of them."
        ),
    ],
    full: Annotated[
        str | None,
        typer.Option(metavar="URL", show_default="none", help="Where the whole model is: it places, and takes over."),
    ] = None,
    evaluation: EvaluationOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8080,
    name: Annotated[
        str | None, typer.Option("--name", show_default="the plan's", help="The model's name in requests.")
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait here for each node; more are refused (429).")
    ] = 16,
    min_quality: MinQualityOption = 0.5,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Let the whole model go on with an answer whose node fails half-way."),
    ] = False,
    connect_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a node has to be reached.")] = 2.0,
    first_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a node has to begin its answer, which a long prompt takes.")
    ] = 300.0,
    chunk_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may stand still.")] = 60.0,
    timeout: TimeoutOption = 3600.0,
    poll: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks at a node's health.")] = 2.0,
    health_timeout: Annotated[
        float, typer.Option(min=0.05, help="Seconds that a look may take; two without an answer: the node is down.")
    ] = 2.0,
    api_key_file: ApiKeyFileOption = None,
    node_key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"API keys that nodes want: a line KEY for all, NAME KEY for one; or one in {NODE_KEY_VARIABLE}."
        ),
    ] = None,
    allow_host: AllowHostOption = None,
    metrics: MetricsOption = "key",
) -> None:
    """Serve the nodes of a plan, each a `moeshard serve SHARD` or a llama-server somewhere, to OpenAI's clients.

    Every session is answered by the node that serves it best. Where that one fails, the whole model answers.
    """
    check_metrics(metrics)

    from moeshard.serving.requirements import require_serving

    require_serving()

    import asyncio

    from moeshard.cli.terminal import warn
    from moeshard.planning.plan import read_plan
    from moeshard.serving.app import build
    from moeshard.serving.auth import read_keys
    from moeshard.serving.gateway import connect
    from moeshard.serving.placer import Placer
    from moeshard.serving.remote import Deadlines
    from moeshard.serving.server import address_of, is_loopback, listen, run
    from moeshard.serving.settings import Settings

    nodes = _read_nodes(node)
    keys = read_keys(api_key_file)
    hosts = None if keys else allowed_hosts(host, allow_host)
    wanted = read_plan(plan)
    limits = {} if evaluation is None else read_limits(evaluation, wanted)
    found = connect(
        wanted,
        nodes,
        full,
        keys=_node_keys(node_key_file, nodes),
        n_waiting=queue,
        deadlines=Deadlines(connect_timeout, first_timeout, chunk_timeout, timeout, poll, health_timeout),
        share_cache=len(keys) < 2,
    )
    asyncio.run(found.survey())
    sock = listen(host, port)
    known = name or Path(str(wanted.model.facts.get("path") or wanted.model.name)).stem
    app = build(
        known,
        Placer([one.name for one in wanted.nodes], found.prober, min_quality=min_quality, limits=limits),
        found.backends,
        Settings(keys=keys, hosts=hosts, metrics=metrics, resume=resume),  # type: ignore[arg-type]
    )
    if not keys and not is_loopback(sock):
        warn(open_to_all(host))
    for one in found.backends:
        if one.fault is not None:
            warn(f"{one.name} is down: {one.fault}")
    if not found.measures:
        warn(found.placing())
    if full is None:
        warn("nobody holds the whole model (--full): a session whose node fails is answered by nobody")

    def ready() -> None:
        names = ", ".join(one.name for one in wanted.nodes)
        typer.echo(f"{address_of(sock)} serves {known}: {len(wanted.nodes)} nodes ({names})"
                   f"{' and the whole model' if full else ''}; {found.placing()}")  # fmt: skip
        typer.echo(how_to_reach(address_of(sock)))

    run(app, sock, ready)


def _read_nodes(given: list[str]) -> dict[str, str]:
    nodes: dict[str, str] = {}
    for text in given:
        name, equals, url = text.partition("=")
        if not (name and equals and url):
            raise typer.BadParameter(
                f"'{text}' is not NAME=URL, such as node-0=http://127.0.0.1:8081", param_hint="--node"
            )
        if name in nodes:
            raise typer.BadParameter(f"'{name}' is given twice", param_hint="--node")
        nodes[name] = url
    return nodes


def _node_keys(path: Path | None, nodes: dict[str, str]) -> dict[str, str]:
    from moeshard import MoeshardError
    from moeshard.serving.gateway import read_node_keys

    keys = read_node_keys(os.environ.get(NODE_KEY_VARIABLE, ""), nodes)
    if path is None:
        return keys
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoeshardError(f"{path}: cannot read the API keys of nodes: {error}") from error
    return {**keys, **read_node_keys(text, nodes)}
