"""`moeshard serve`: an OpenAI-compatible server that places sessions on the nodes of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeshard.cli.options import GpuLayersOption, ModelArgument, RpcOption, SplitOption, ThreadsOption, pipeline
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

if TYPE_CHECKING:
    from moeshard.planning.plan import Plan
    from moeshard.runtime.model import Model
    from moeshard.serving.local import Local, LocalOptions

PlanOption = Annotated[
    Path | None, typer.Option(help="Nodes to place sessions on: what `moeshard plan` wrote. Without it: the model.")
]

ContextOption = Annotated[
    int | None, typer.Option("--ctx", min=1, show_default="the model's, at most 4096", help="Tokens of each request.")
]

TemplateOption = Annotated[
    str,
    typer.Option(
        "--chat-template",
        show_default="the model's own",
        help="The name of a chat template that llama.cpp knows, such as chatml, or a file with one.",
    ),
]


def read_template(given: str) -> str:
    """Return a template: the text of a file, or the name itself."""
    path = Path(given)
    if not given or not path.is_file():
        return given
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read the chat template '{given}': {error}") from error


def serve(
    model: ModelArgument,
    plan: PlanOption = None,
    evaluation: EvaluationOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8080,
    name: Annotated[
        str | None, typer.Option("--name", show_default="the file's", help="The model's name in requests.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Requests computed at once.")] = 4,
    ctx: ContextOption = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused (429).")] = 64,
    probe: Annotated[
        int, typer.Option(min=16, help="Look at so many last tokens of a session's first turn to place it.")
    ] = 256,
    min_quality: MinQualityOption = 0.5,
    timeout: TimeoutOption = 3600.0,
    template: TemplateOption = "",
    api_key_file: ApiKeyFileOption = None,
    allow_host: AllowHostOption = None,
    metrics: MetricsOption = "key",
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = -1,
    rpc: RpcOption = None,
    split: SplitOption = None,
) -> None:
    """Serve a model to OpenAI's clients, every session by the node of the plan that serves it best.

    Ctrl-C ends it when the answers that have begun are done; a second one at once.
    """
    check_metrics(metrics)

    from moeshard.serving.requirements import require_serving

    require_serving()

    from moeshard.cli.terminal import warn
    from moeshard.serving.app import build
    from moeshard.serving.auth import read_keys
    from moeshard.serving.local import LocalOptions
    from moeshard.serving.placer import Placer
    from moeshard.serving.server import address_of, is_loopback, listen, run
    from moeshard.serving.settings import Settings

    keys = read_keys(api_key_file)
    hosts = None if keys else allowed_hosts(host, allow_host)
    sock = listen(host, port)
    options = LocalOptions(
        n_slots=parallel,
        n_ctx=ctx,
        n_waiting=queue,
        n_probe=probe,
        seconds=timeout,
        template=read_template(template),
    )
    local, nodes = load_local(model, plan, options, threads, gpu_layers, workers=pipeline(rpc, split))
    known = name or Path(model).stem
    limits = read_limits(evaluation, nodes) if evaluation is not None else {}
    app = build(
        known,
        Placer(
            [node.name for node in nodes.nodes] if nodes else [],
            local.prober,
            min_quality=min_quality,
            limits=limits,
        ),
        local.backends,
        Settings(keys=keys, hosts=hosts, metrics=metrics),  # type: ignore[arg-type]
        local.model,
        local.inner,
    )
    if not keys and not is_loopback(sock):
        warn(open_to_all(host))
    if local.renderer.is_plain:
        warn("the model has no chat template; chats are written as plain lines 'role: text' (or use --chat-template)")

    def ready() -> None:
        typer.echo(f"{address_of(sock)} serves {known}: {_describe(local, parallel)}")
        typer.echo(how_to_reach(address_of(sock)))
        if nodes is not None:
            moving = f"away from {', '.join(limits)}" if limits else "nowhere (see --evaluation)"
            typer.echo(f"Sessions whose node misses too much of what they need are moved {moving}.")

    run(app, sock, ready)


def load_local(
    model: str,
    plan: Path | None,
    options: LocalOptions,
    threads: int,
    gpu_layers: int,
    keep: str | None = None,
    workers: dict[str, Any] | None = None,
) -> tuple[Local, Plan | None]:
    """Load a model and, where there is one, its plan, and make the engine that answers by them."""
    from moeshard.cli.loading import load_model
    from moeshard.planning.plan import read_plan
    from moeshard.serving.local import serve_locally

    nodes = None if plan is None else read_plan(plan)
    loaded: Model = load_model(model, n_ctx=options.n_ctx, n_threads=threads, n_gpu_layers=gpu_layers, workers=workers)
    mask = None if keep is None else loaded.keep(keep)
    return serve_locally(loaded, nodes, options, mask), nodes


def _describe(local: Local, parallel: int) -> str:
    names = [backend.name for backend in local.backends[1:]]
    alone = "the whole model" if local.model.is_whole else f"a shard, {local.model.n_expert} experts per layer"
    nodes = f"{len(names)} nodes ({', '.join(names)}) and the whole model" if names else alone
    return f"{nodes}, {parallel} requests at once of {local.backends[0].n_ctx} tokens"
