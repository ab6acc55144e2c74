"""`moeshard worker`: layers computed for models of other machines."""

from __future__ import annotations

import ipaddress
import signal
from pathlib import Path
from typing import Annotated

import typer

from moeshard.cli.options import ThreadsOption, parse_size


def worker(
    bind: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="Where to listen; port 0: a free one. The protocol knows no authentication."
        ),
    ] = "127.0.0.1:50052",
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            show_default="what is free",
            help="Memory for the layers of a client, such as 24GiB; more is refused.",
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep tensors here, so that they are not sent again.")
    ] = None,
    cache_size: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            show_default="no limit",
            help="Beyond that, the tensors used longest ago are removed.",
        ),
    ] = None,
    threads: ThreadsOption = 0,
) -> None:
    """Hold and compute layers for a model of another machine that names this one with --rpc.

    One client at a time. Ctrl-C ends it.
    """
    if cache_size is not None and cache is None:
        raise typer.BadParameter("--cache-size goes with --cache")

    from moeshard.cli.terminal import warn
    from moeshard.cluster.worker import Worker, WorkerOptions
    from moeshard.runtime.workers import parse_endpoint
    from moeshard.sizes import size

    options = WorkerOptions(memory or 0, threads, cache, cache_size or 0)
    served = Worker(*parse_endpoint(bind, 0), options, typer.echo)
    host, port = served.address
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: served.close())
    if not ipaddress.ip_address(host).is_loopback:
        warn(
            f"whoever reaches {host}:{port} can compute, read and write in this process: let it be reached through a "
            f"tunnel only (docs/cluster.md), and run it as a user with few rights"
        )
    typer.echo(f"worker at {host}:{port}, {size(served.memory)} for layers; elsewhere: --rpc {host}:{port}")
    served.run()
