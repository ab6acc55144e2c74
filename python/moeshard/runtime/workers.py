"""Workers on other machines, asked before an engine connects to them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import moeshard._core as _core
from moeshard._core import MoeshardError

QUESTION = b"moeshard\n"
"""What a worker is sent first by who wants to know its status. A client of llama.cpp's protocol begins otherwise."""
ANSWER_SECONDS = 5.0
LEAVING_SECONDS = 2.0
MOST_ANSWER_BYTES = 1 << 16


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker says of itself."""

    endpoint: str
    versions: dict[str, str]
    """Of moeshard, llama.cpp and its protocol."""
    memory: int
    """Bytes that it has for layers."""
    n_threads: int
    busy: str | None
    """The address of the client that it serves; None: it is free."""


def own_versions() -> dict[str, str]:
    """Return what must be the same at both ends."""
    return {
        "moeshard": version("moeshard"),
        "llama.cpp": _core.system_info().llama_cpp,
        "protocol": _core.rpc_version(),
    }


def parse_endpoint(endpoint: str, least_port: int = 1) -> tuple[str, int]:
    """Return host and port of ``host:port``; raises MoeshardError for anything else."""
    host, colon, port = endpoint.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and least_port <= int(port) < 1 << 16):
        raise MoeshardError(f"'{endpoint}' is no worker; write host:port, e.g. 192.168.1.20:50052")
    return host, int(port)


def ask(endpoint: str, seconds: float = ANSWER_SECONDS) -> WorkerStatus:
    """Return what the worker at ``host:port`` says of itself.

    Raises:
        MoeshardError: it cannot be reached, says nothing within `seconds`, or is no moeshard worker.
    """
    address = parse_endpoint(endpoint)
    try:
        with socket.create_connection(address, seconds) as connection:
            connection.settimeout(seconds)
            connection.sendall(QUESTION)
            answer = _read_line(connection)
    except TimeoutError:
        raise MoeshardError(f"worker {endpoint} says nothing within {seconds:g} s") from None
    except OSError as error:
        raise MoeshardError(
            f"worker {endpoint} cannot be reached: {error.strerror or error}; is it started there, with 'moeshard "
            f"worker --bind {endpoint}'?"
        ) from error
    return _parse(endpoint, answer)


def _read_line(connection: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < MOST_ANSWER_BYTES:
        piece = connection.recv(1 << 12)
        if not piece:
            break
        answer += piece
    return answer


def _parse(endpoint: str, answer: bytes) -> WorkerStatus:
    try:
        found: dict[str, Any] = json.loads(answer)
        return WorkerStatus(
            endpoint,
            {str(name): str(value) for name, value in found["versions"].items()},
            int(found["memory"]),
            int(found["n_threads"]),
            found["busy"],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MoeshardError(
            f"{endpoint} is no moeshard worker: what listens there answers otherwise; llama.cpp's own rpc-server can "
            f"not be used, since it cannot say whether it is free or of which version it is"
        ) from None


def _ask_for_service(endpoint: str) -> WorkerStatus:
    """As `ask`, but what a client that has just left still holds is waited for."""
    deadline = time.monotonic() + LEAVING_SECONDS
    while True:
        found = ask(endpoint)
        if found.busy is None or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def check_workers(endpoints: Sequence[str]) -> list[WorkerStatus]:
    """Return the status of workers that an engine can connect to now.

    Raises:
        MoeshardError: naming the worker that cannot be reached, serves somebody else, or is of another version.
    """
    if len(set(endpoints)) != len(endpoints):
        raise MoeshardError(f"a worker is named twice: {', '.join(endpoints)}; each takes one part of the layers")
    found = [_ask_for_service(endpoint) for endpoint in endpoints]
    own = own_versions()
    for worker in found:
        for name, value in own.items():
            theirs = worker.versions.get(name, "unknown")
            if theirs != value:
                raise MoeshardError(
                    f"worker {worker.endpoint} runs {name} {theirs}, this is {value}; install the same version of "
                    f"moeshard at both ends"
                )
        if worker.busy is not None:
            raise MoeshardError(
                f"worker {worker.endpoint} serves {worker.busy}, and a worker serves one client at a time; wait until "
                f"that one has ended, or start another worker"
            )
    return found
