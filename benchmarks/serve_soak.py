"""Keep `moeshard serve` busy for a while, and see that nothing grows and nothing is lost.

    python benchmarks/serve_soak.py [MODEL] --minutes 20

A server with a plan of four nodes and two API keys is asked by many clients at once: whole answers and streams, of
sessions that go on, by schemas, with log-probabilities, of several prompts; streams that their clients cut; requests
that are wrong. Every whole answer must end with a finish_reason, every wrong request with its status. Memory is looked
at all the time. At the end slots, descriptors and threads must be what they were when nobody asked, and memory what it
was after the warm-up. Threads that make tokens of long prompts are kept: there may be as many as Python's own pool has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from serve_speed import free_port, running

import moeshard
from moeshard.traffic.embedded import embedded_text

KEYS = ("first-key", "second-key")
N_SESSIONS = 200
WARM_UP = 0.2
"""Share of the time after which memory has to stay what it is."""
GROWTH = 16.0
"""MiB by which it may seem to grow: what an allocator gives back when it likes."""
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
}
TEXTS = {name: embedded_text(name) for name in ("de", "en", "py")}


class Soak:
    """Clients of one server."""

    def __init__(self, http: httpx.AsyncClient, model: str, seed: int):
        self.http, self.model = http, model
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()

    def text(self) -> str:
        text = TEXTS[self.random.choice(list(TEXTS))]
        begin = self.random.randrange(len(text) - 600)
        return text[begin : begin + self.random.randrange(20, 450)]

    def headers(self) -> dict[str, str]:
        found = {"Authorization": f"Bearer {self.random.choice(KEYS)}"}
        if self.random.random() < 0.7:
            found["x-session-id"] = f"session-{self.random.randrange(N_SESSIONS)}"
        return found

    def body(self, **own: Any) -> dict[str, Any]:
        common = {"max_tokens": self.random.randrange(1, 60), "temperature": self.random.choice([0, 0.8])}
        return {**common, "seed": self.random.randrange(2**32), **own}

    def chat(self, **own: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.text()}]
        if self.random.random() < 0.5:
            messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": self.text()[:100]}]
        return self.body(messages=messages, **own)

    async def post(self, path: str, body: Any, status: int = 200) -> Any:
        """Return an answer that has this status; a full queue is asked again."""
        while True:
            got = await self.http.post(path, json=body, headers=self.headers())
            if got.status_code != 429 or status == 429:
                break
            self.done["429, asked again"] += 1
            await asyncio.sleep(0.2)
        if got.status_code != status:
            raise SystemExit(f"{path}: {got.status_code}, not {status}: {got.text[:500]}\n{json.dumps(body)[:1000]}")
        return got.json()

    # What clients do.

    async def whole_chat(self) -> None:
        _check_choices(await self.post("/v1/chat/completions", self.chat()))

    async def whole_text(self) -> None:
        wants = {"logprobs": 3, "echo": True} if self.random.random() < 0.3 else {}
        _check_choices(await self.post("/v1/completions", self.body(prompt=self.text(), **wants)))

    async def prompt_only(self) -> None:
        body = {"prompt": self.text(), "max_tokens": 0, "echo": True, "logprobs": 1, "model": f"{self.model}@full"}
        _check_choices(await self.post("/v1/completions", body))

    async def many_prompts(self) -> None:
        _check_choices(await self.post("/v1/completions", self.body(prompt=[self.text() for _ in range(5)])))

    async def by_schema(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        answer = await self.post("/v1/chat/completions", self.chat(response_format=form))
        _check_choices(answer)
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop" and not {"a", "b"} <= set(json.loads(choice["message"]["content"])):
            raise SystemExit(f"not by the schema: {choice}")

    async def whole_stream(self) -> None:
        finish, last = None, b""
        async for line in self.lines(self.chat(stream=True, stream_options={"include_usage": True})):
            last = line
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(f"a stream failed: {chunk}")
                finish = next((choice["finish_reason"] for choice in chunk["choices"]), None) or finish
        if finish not in ("stop", "length") or last != b"data: [DONE]":
            raise SystemExit(f"a stream ended with {finish} and {last!r}")

    async def cut_stream(self) -> None:
        left = self.random.randrange(8)
        async for _ in self.lines(self.chat(stream=True, max_tokens=100)):
            left -= 1
            if left < 0:
                return

    async def cut_at_once(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.whole_chat(), self.random.random() * 0.2)

    async def wrong(self) -> None:
        chat = self.chat()
        path, body, status = self.random.choice(
            [
                ("/v1/chat/completions", {"messages": []}, 400),
                ("/v1/chat/completions", {**chat, "model": "nobody"}, 404),
                ("/v1/chat/completions", {**chat, "tools": [{"type": "function"}]}, 400),
                ("/v1/chat/completions", {**chat, "temperature": "hot"}, 400),
                ("/v1/completions", {"prompt": self.text() * 100}, 400),
                ("/v1/completions", {"prompt": "x", "grammar": "root ::= ("}, 400),
                ("/v1/completions", {"prompt": "x", "logit_bias": {"99999999": 1}}, 400),
                ("/v1/completions", [1, 2], 400),
                ("/v1/embeddings", {"input": "x"}, 501),
            ]
        )
        await self.post(path, body, status)

    async def unknown(self) -> None:
        got = await self.http.post("/v1/completions", json={"prompt": "x"}, headers={"x-api-key": "nobody's"})
        if got.status_code != 401:
            raise SystemExit(f"an unknown key got {got.status_code}")

    async def lines(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Yield the lines of a stream that are not empty."""
        while True:
            async with self.http.stream("POST", "/v1/chat/completions", json=body, headers=self.headers()) as answer:
                if answer.status_code == 429:
                    self.done["429, asked again"] += 1
                elif answer.status_code != 200:
                    raise SystemExit(f"a stream got {answer.status_code}: {await answer.aread()!r}")
                else:
                    async for line in answer.aiter_lines():
                        if line:
                            yield line.encode()
                    return
            await asyncio.sleep(0.2)

    async def client(self, until: float) -> None:
        """Ask one thing after the other."""
        kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (6, self.whole_chat),
            (4, self.whole_text),
            (2, self.prompt_only),
            (1, self.many_prompts),
            (3, self.by_schema),
            (8, self.whole_stream),
            (5, self.cut_stream),
            (3, self.cut_at_once),
            (4, self.wrong),
            (1, self.unknown),
        ]
        while time.monotonic() < until:
            kind = self.random.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])[0]
            await kind()
            self.done[kind.__name__] += 1


def _check_choices(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        if choice["finish_reason"] not in ("stop", "length"):
            raise SystemExit(f"an answer without an end: {choice}")


def state(process: psutil.Process) -> tuple[float, int, int]:
    """Return memory in MiB, descriptors and threads."""
    with process.oneshot():
        return process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()


async def idle(http: httpx.AsyncClient) -> None:
    """Wait until no request is computed; within a few steps there must be none."""
    for _ in range(100):
        nodes = (await http.get("/nodes", headers={"x-api-key": KEYS[0]})).json()["data"]
        if not any(node["running"] or node["waiting"] for node in nodes):
            return
        await asyncio.sleep(0.1)
    raise SystemExit(f"slots are not given back: {nodes}")


async def soak(url: str, model: str, process: psutil.Process, args: argparse.Namespace) -> bool:
    """Ask, measure, and return whether all is as it was."""
    limits = httpx.Limits(max_connections=args.clients + 1, max_keepalive_connections=args.clients // 2)

    async def ask(minutes: float, seed: int) -> tuple[Counter[str], np.ndarray]:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            clients = Soak(http, model, seed)
            end = time.monotonic() + 60 * minutes
            work = asyncio.gather(*(clients.client(end) for _ in range(args.clients)))
            rows = []
            while not work.done():
                await asyncio.wait({work}, timeout=2)
                rows.append((time.monotonic(), *state(process)))
            await work
            await idle(http)
        await asyncio.sleep(1)
        return clients.done, np.array(rows)

    await ask(0.1, seed=-1)  # all threads that are kept have begun
    before = state(process)
    done, rows = await ask(args.minutes, args.seed)
    after = state(process)

    minutes = (rows[:, 0] - rows[0, 0]) / 60
    warm = minutes >= WARM_UP * minutes[-1]
    slope = float(np.polyfit(minutes[warm], rows[warm, 1], 1)[0])
    growth = slope * float(minutes[-1] - minutes[warm][0])
    for name, n in sorted(done.items()):
        print(f"  {name:20}{n:8}")
    print(f"  requests/s          {done.total() / (60 * minutes[-1]):8.1f}")
    most, usual = rows[:, 1].max(), np.median(rows[warm, 1])
    print(f"  memory, MiB: {before[0]:.1f} before, {usual:.1f} warm, at most {most:.1f}, {after[0]:.1f} after")
    print(f"  memory, once warm: {slope:+.3f} MiB a minute, {growth:+.1f} MiB in all")
    print(f"  descriptors: {before[1]} before, at most {rows[:, 2].max():.0f}, {after[1]} after")
    print(f"  threads: {before[2]} before, at most {rows[:, 3].max():.0f}, {after[2]} after", flush=True)
    n_pool = min(32, (os.cpu_count() or 1) + 4)
    return growth <= GROWTH and after[1] <= before[1] and after[2] <= before[2] + n_pool


def make_plan(model: str, folder: Path) -> Path:
    """Return a plan of four nodes."""
    profile, plan = folder / "profile.npz", folder / "plan.json"
    command = [sys.executable, "-m", "moeshard"]
    subprocess.run([*command, "analyze", model, "-n", "1024", "-o", profile], check=True, stdout=subprocess.DEVNULL)
    options = ["--profile", profile, "--groups", "4", "--keep", "64", "-o", plan]
    subprocess.run([*command, "plan", model, *options], check=True, stdout=subprocess.DEVNULL)
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(moeshard.embedded_model()))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan, keys = make_plan(args.model, Path(folder)), Path(folder) / "keys"
        keys.write_text("\n".join(KEYS))
        options = ["--parallel", "4", "--ctx", "512", "--queue", "16", "--threads", str(args.threads), "--name", "soak"]
        command = [sys.executable, "-m", "moeshard", "serve", args.model, "--plan", str(plan), *options]
        with running("moeshard", [*command, "--api-key-file", str(keys)], free_port()) as server:
            process = psutil.Process(server.pid)
            fine = asyncio.run(soak(f"http://127.0.0.1:{server.port}", "soak", process, args))
    print("all is as it was" if fine else "NOT all is as it was")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
