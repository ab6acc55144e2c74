"""Compare `moeshard serve` with llama.cpp's own llama-server of the same pin: tokens/s and time to first token.

    python benchmarks/serve_speed.py [MODEL...]     # by default the embedded one

Both servers hold the same file, with as many threads, slots and tokens of context for each slot. A round asks one of
them, then the other (in alternating order) for N answers at once, of the same prompts, which nobody saw before; what
counts is the ratio within a round, of which the median is told with a 95 % bootstrap interval. Above 1 moeshard is the
better one. Tokens/s are those of all streams together, from the first request to the last token, prompts included.
Processor time is that of all the server's threads, for each token of an answer; others on the machine change it less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from engine_cost import median_interval
from llama_server import build

import moeshard

SAMPLINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    # What both do by default; llama-server's further samplers are off by default.
    "default": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0},
}
SECONDS = 300.0


@dataclass
class Stream:
    """A request, and when what came of it."""

    sock: socket.socket
    received: bytearray = field(default_factory=bytearray)
    first: float = 0.0
    end: float = 0.0

    def read(self) -> bool:
        """Take what is there; return whether the answer is done."""
        data = self.sock.recv(1 << 20)
        self.received += data
        now = time.perf_counter()
        if not self.first and b"data: " in self.received:
            self.first = now
        self.end = now
        if b"data: [DONE]" in self.received[-len(data) - 16 :]:
            return True
        if not data:
            raise SystemExit(f"an answer was cut: {bytes(self.received[-500:])!r}")
        return False

    def n_tokens(self) -> int:
        """Return how many tokens the answer has."""
        lines = [line for line in self.received.split(b"\n") if line.startswith(b"data: {")]
        chunks = [json.loads(line[6:]) for line in lines]
        return int(next(chunk["usage"]["completion_tokens"] for chunk in reversed(chunks) if chunk.get("usage")))


@dataclass(frozen=True)
class Server:
    """One that runs."""

    name: str
    port: int
    pid: int

    def ask(self, bodies: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
        """Stream answers to all bodies at once; return tokens/s, the median time to the first token, and the processor
        time for each token."""
        process = psutil.Process(self.pid)
        cpu = sum(process.cpu_times()[:2])
        selector = selectors.DefaultSelector()
        sends = [_post(self.port, body) for body in bodies]
        streams = [Stream(socket.create_connection(("127.0.0.1", self.port))) for _ in bodies]
        begin = time.perf_counter()
        for stream, data in zip(streams, sends, strict=True):
            stream.sock.sendall(data)
            selector.register(stream.sock, selectors.EVENT_READ, stream)
        while selector.get_map():
            ready = selector.select(SECONDS)
            if not ready:
                raise SystemExit(f"{self.name} says nothing")
            for key, _ in ready:
                if key.data.read():
                    selector.unregister(key.fileobj)
                    key.data.sock.close()
        for stream, body in zip(streams, bodies, strict=True):
            if stream.n_tokens() != body["max_tokens"]:
                raise SystemExit(f"{self.name} wrote {stream.n_tokens()} tokens, not {body['max_tokens']}")
        seconds = max(stream.end for stream in streams) - begin
        first = float(np.median([stream.first - begin for stream in streams]))
        n_tokens = sum(body["max_tokens"] for body in bodies)
        return n_tokens / seconds, first, (sum(process.cpu_times()[:2]) - cpu) / n_tokens


def _post(port: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


@contextlib.contextmanager
def running(name: str, command: Sequence[str], port: int) -> Iterator[Server]:
    """Run a server until the end of the block; what it says is shown only if it fails."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        try:
            end = time.monotonic() + SECONDS
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    sys.stderr.buffer.write(log.read()[-4000:])
                    raise SystemExit(f"{name} does not answer")
                time.sleep(0.1)
            yield Server(name, port, process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def prompts(n_tokens: int, seed: int = 0) -> Iterator[list[int]]:
    """Yield prompts of random tokens, some that every vocabulary has: nothing of one is remembered from another."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.integers(16, 1000, n_tokens).tolist()


def measure(model: str, llama_server: Path, args: argparse.Namespace) -> None:
    slots = max(args.streams)
    ctx = args.prompt + args.tokens + 16
    ours = [sys.executable, "-m", "moeshard", "serve", model, "--parallel", str(slots), "--ctx", str(ctx)]
    theirs = [str(llama_server), "-m", model, "-np", str(slots), "-c", str(slots * ctx), "--no-kv-unified"]
    theirs += ["-t", str(args.threads), "-tb", str(args.threads), "--host", "127.0.0.1", "--cache-ram", "0"]
    size = os.path.getsize(model) / 2**20
    print(f"{model}: {size:.0f} MiB, {args.threads} threads, {slots} slots of {ctx} tokens, prompts of {args.prompt}")
    print(f"answers of {args.tokens} tokens, {args.rounds} rounds; moeshard | llama-server | ratio [95 %]")
    if args.cpus:
        ours, theirs = (["taskset", "--cpu-list", args.cpus, *command] for command in (ours, theirs))
    with (
        running("moeshard", [*ours, "--threads", str(args.threads)], free_port()) as mine,
        running("llama-server", theirs, free_port()) as stock,
    ):
        fresh = prompts(args.prompt)
        for name in args.sampling:
            for n in args.streams:
                found = np.empty((args.rounds, 2, 3))
                for i in range(-1, args.rounds):  # the first is not counted
                    base = {"max_tokens": args.tokens, "ignore_eos": True, "stream": True, **SAMPLINGS[name]}
                    base["stream_options"] = {"include_usage": True}
                    bodies = [{**base, "prompt": next(fresh), "seed": 1 + k} for k in range(n)]
                    for which in (0, 1) if i % 2 == 0 else (1, 0):
                        figures = (mine, stock)[which].ask(bodies)
                        if i >= 0:
                            found[i, which] = figures
                speed, first, cpu = (found[:, :, which] for which in range(3))
                print(f"  {name}, {n} streams", flush=True)
                print(f"    tokens/s           {_row(speed, speed[:, 0] / speed[:, 1], 1)}")
                print(f"    first token, ms    {_row(first, first[:, 1] / first[:, 0], 1000)}")
                print(f"    processor, ms      {_row(cpu, cpu[:, 1] / cpu[:, 0], 1000)}", flush=True)


def _row(values: np.ndarray, ratios: np.ndarray, scale: float) -> str:
    mine, stock = np.median(values, axis=0) * scale
    median, low, high = median_interval(ratios)
    return f"{mine:8.2f} | {stock:8.2f} | {median:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[str(moeshard.embedded_model())])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--sampling", nargs="+", choices=list(SAMPLINGS), default=list(SAMPLINGS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpus", default="", help="processors that the servers may use, such as 0,1 (Linux); all")
    parser.add_argument("--llama-server", type=Path, help="by default the one of the pin, built where it is not there")
    args = parser.parse_args()
    llama_server = args.llama_server or build()
    for model in args.models:
        measure(model, llama_server, args)


if __name__ == "__main__":
    main()
