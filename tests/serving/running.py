"""A server in a thread of the tests, on a port of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from moeshard.serving.server import address_of, listen


class Running:
    """Serves until `stop`."""

    def __init__(self, make: Callable[[], ASGIApp], port: int = 0):
        self._socket: socket.socket = listen("127.0.0.1", port)
        self.url = address_of(self._socket)
        config = uvicorn.Config(make(), log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._socket])), daemon=True)
        self._thread.start()
        end = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
