"""Running the application: a socket, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from moeshard._core import MoeshardError

DRAIN_SECONDS = 30


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that nobody is answered on yet; port 0 is any that is free.

    Raises:
        MoeshardError: the address cannot be had.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        raise MoeshardError(
            f"cannot listen on {host}, port {port}: {error}; choose another --port or --host"
        ) from error
    return sock


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def address_of(sock: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: ASGIApp, sock: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGINT or SIGTERM; answers that have begun are finished, for half a minute.

    A second signal ends them at once.

    Args:
        app: the application.
        sock: from `listen`.
        ready: called when requests are answered.

    Raises:
        MoeshardError: the application could not start.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=DRAIN_SECONDS,
        server_header=False,
        ws="none",
        proxy_headers=False,
    )
    server = _Server(config, ready)
    with contextlib.suppress(KeyboardInterrupt), _terminated_like_interrupted():
        asyncio.run(server.serve([sock]))
    if not server.started:
        raise MoeshardError("the server could not start; what is above says why")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, when all is done: SIGTERM would then kill the process."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
