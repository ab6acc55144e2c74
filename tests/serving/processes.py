"""`moeshard serve` and `moeshard gateway` as processes of their own, which tests stop and kill."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1", "MOESHARD_API_KEY": "", "MOESHARD_NODE_API_KEY": ""}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Process:
    """A command that serves; begun again, it has the same address."""

    def __init__(self, command: str, *arguments: str | Path):
        self._command = [sys.executable, "-m", "moeshard", command, *map(str, arguments), "--port"]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.said = self.warned = ""
        self.process = self._begin()

    def _begin(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the process
        process = subprocess.Popen(
            [*self._command, str(self.port)], stdout=subprocess.PIPE, stderr=self._errors, text=True, env=ENVIRONMENT
        )
        assert process.stdout is not None
        self.said = process.stdout.readline()
        self._errors.seek(0)
        self.warned = self._errors.read()
        assert re.match(r"http://\S+ serves ", self.said), (self.said, self.warned)
        return process

    @property
    def n_files(self) -> int:
        n: int = psutil.Process(self.process.pid).num_fds()
        return n

    def send(self, number: int) -> None:
        """Send a signal; what kills has killed then."""
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(60)

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()

    def begin_again(self) -> None:
        """Kill it and begin it anew."""
        self.close()
        self.process = self._begin()
