"""A worker as a user starts it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable


class Worker:
    """A running ``moeshard worker``."""

    def __init__(self, *options: str, port: int = 0):
        command = [sys.executable, "-m", "moeshard", "worker", "--bind", f"127.0.0.1:{port}", "--threads", "1"]
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        assert self.said.startswith("worker at "), self.said + self.process.stdout.read()
        self.endpoint = self.said.split()[2].rstrip(",")
        self.port = int(self.endpoint.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def end(self) -> str:
        """End it as a user does; return what else it said."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        said, _ = self.process.communicate(timeout=60)
        return said


Start = Callable[..., Worker]
