"""The process in which a worker computes for one client: ``python -m moeshard.cluster.connection FD OPTIONS``.

A client that sends what cannot be computed ends this process, never the worker; what it held is given back to the
system with it.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from moeshard._core import MoeshardError, serve_connection

MEMORY_BESIDE = 512 << 20
"""Bytes that a process needs beside the layers of its clients: code, graphs, what is on its way."""


def main() -> int:
    """Serve the connection that was handed over, until the client leaves."""
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    options = json.loads(sys.argv[2])
    _limit_memory(options["memory"])
    try:
        serve_connection(int(sys.argv[1]), **options)
    except MoeshardError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _end_with_the_worker() -> None:
    """The worker holds the other end of standard input; it closes when that is killed."""
    sys.stdin.buffer.read()
    os._exit(1)


def _limit_memory(memory: int) -> None:
    """What clients are told is also what they get: an allocation beyond it fails, and the client is told."""
    if memory and sys.platform == "linux":  # elsewhere the limit of data does not count mapped memory
        import resource

        limit = memory + MEMORY_BESIDE
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
