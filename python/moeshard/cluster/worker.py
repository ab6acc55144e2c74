"""A worker: listens, says what it is, and hands its clients to a process that computes for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moeshard._core import MoeshardError, default_threads
from moeshard.cluster.cache import prepare_cache, prune_cache
from moeshard.runtime.workers import QUESTION, own_versions

FIRST_BYTES_SECONDS = 5.0
LEAVING_SECONDS = 5.0
"""How long a new client waits for the process of the one before to end: engines connect anew while they load."""
TOLD_SECONDS = 0.5
"""Shorter connections, in which an engine asks for this and that, are not spoken of."""
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""After a minute without an answer a client whose machine is gone is given up."""
RECEPTIONISTS = 8


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker computes."""

    memory: int = 0
    """Bytes for layers of clients; 0: what the machine has."""
    n_threads: int = 0
    cache: Path | None = None
    cache_size: int = 0
    """Bytes that the cache may hold; 0: without limit."""


class Worker:
    """Serves one client at a time, until it is closed."""

    def __init__(self, host: str, port: int, options: WorkerOptions, log: Callable[[str], object]):
        """Begin to listen; port 0 for one that is free.

        Raises:
            MoeshardError: the address cannot be listened on, or the cache cannot be used.
        """
        self._options, self._log = options, log
        self._versions = own_versions()
        if options.cache is not None:
            prepare_cache(options.cache)
            self._prune()
        try:
            self._listener = socket.create_server((host, port), family=socket.AF_INET, backlog=16)
        except OSError as error:
            raise MoeshardError(
                f"{host}:{port} cannot be listened on: {_reason(error)}; name an address of this machine and "
                f"a free port"
            ) from error
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        """Through which the process is given connections."""
        self._peer: str | None = None
        self._free = threading.Condition()
        self._closed = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self._listener.getsockname()
        return host, port

    @property
    def memory(self) -> int:
        """Bytes that a client can have now."""
        return min(self._options.memory or sys.maxsize, _free_memory())

    def run(self) -> None:
        """Serve until `close` is called, from another thread or a signal."""
        with ThreadPoolExecutor(RECEPTIONISTS, "reception") as reception:
            while not self._closed:
                try:
                    connection, peer = self._listener.accept()
                except OSError:
                    break  # closed
                reception.submit(self._receive, connection, f"{peer[0]}:{peer[1]}")

    def close(self) -> None:
        """Stop listening and end the client's process."""
        self._closed = True
        self._listener.close()
        process = self._process
        if process is not None:
            process.kill()

    def _receive(self, connection: socket.socket, peer: str) -> None:
        with connection:
            try:
                connection.settimeout(FIRST_BYTES_SECONDS)
                first = connection.recv(1, socket.MSG_PEEK)
                if first == QUESTION[:1]:
                    connection.sendall(json.dumps(self._status()).encode() + b"\n")
                elif first:
                    self._serve(connection, peer)
            except OSError:
                return  # it left

    def _status(self) -> dict[str, object]:
        return {
            "versions": self._versions,
            "memory": self.memory,
            "n_threads": self._options.n_threads or default_threads(),
            "busy": self._peer,
        }

    def _serve(self, connection: socket.socket, peer: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        with self._free:
            if not self._free.wait_for(lambda: self._peer is None, LEAVING_SECONDS):
                self._log(f"{peer} turned away: {self._peer} is served")
                return
            self._peer = peer
        started = time.monotonic()
        try:
            code = self._compute(connection)
        finally:
            with self._free:
                self._peer = None
                self._free.notify_all()
        seconds = time.monotonic() - started
        if code or seconds >= TOLD_SECONDS:
            self._log(f"{peer} left after {seconds:.0f} s" + (f", exit code {code}" if code else ""))
        self._prune()

    def _compute(self, connection: socket.socket) -> int:
        """Have a connection served; return the exit code of the process, 0 where it goes on."""
        if self._process is None:
            self._process, self._control = self._begin()
        assert self._control is not None
        try:
            socket.send_fds(self._control, [b"."], [connection.fileno()])
            connection.close()  # the client sees the end of the process only when this end is closed, too
            if self._control.recv(1):
                return 0
        except OSError:
            pass  # it ended before
        with self._process as ended, self._control:
            self._process = self._control = None
            return ended.wait()

    def _begin(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        options = {
            "cache": "" if self._options.cache is None else os.fspath(self._options.cache),
            "n_threads": self._options.n_threads,
            "memory": self._options.memory,
        }
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "moeshard.cluster.connection", str(theirs.fileno()), json.dumps(options)]
            # Its standard input closes when this process is gone, however.
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.PIPE)
        if self._closed:
            process.kill()
        return process, ours

    def _prune(self) -> None:
        if self._options.cache is not None and self._options.cache_size:
            prune_cache(self._options.cache, self._options.cache_size)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno is not None else str(error)


def _free_memory() -> int:
    """Bytes that could be allocated now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
