"""The process in which a worker computes for its clients: ``python -m moeshard.cluster.connection FD OPTIONS``.

A client that sends what cannot be computed ends this process, never the worker. It is handed connections through FD, a
socket of the worker, one at a time, and says there when one is over.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading

from moeshard._core import MoeshardError, serve_connection

OVER = b"."
MEMORY_BESIDE = 512 << 20
"""Bytes that a process needs beside the layers of its clients: code, graphs, what is on its way."""


def main() -> None:
    """Serve connections until the worker is gone."""
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    options = json.loads(sys.argv[2])
    _limit_memory(options["memory"])
    with socket.socket(fileno=int(sys.argv[1])) as worker:
        while True:
            message, fds, *_ = socket.recv_fds(worker, 1, 1)
            if not message:
                return
            try:
                serve_connection(fds[0], **options)
            except MoeshardError as error:
                print(error, file=sys.stderr)
                os._exit(1)  # nobody knows what the engine still holds
            worker.sendall(OVER)


def _end_with_the_worker() -> None:
    """The worker holds the other end of standard input; it closes when that is killed."""
    os.read(0, 1)
    os._exit(1)


def _limit_memory(memory: int) -> None:
    """What clients are told is also what they get: an allocation beyond it fails, and the client is told."""
    if memory and sys.platform == "linux":  # elsewhere the limit of data does not count mapped memory
        import resource

        limit = memory + MEMORY_BESIDE
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
