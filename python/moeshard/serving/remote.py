"""Answers from other servers: a node, or the whole model, reached over HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from moeshard._core import MoeshardError
from moeshard.serving.backends import FULL, Ask, Event, Load
from moeshard.serving.errors import timed_out
from moeshard.serving.gate import Gate
from moeshard.serving.health import Health
from moeshard.serving.line import Line, Said
from moeshard.serving.node_errors import NodeError, told
from moeshard.serving.protocol import Message, Prompt, prompt_json
from moeshard.serving.stream import Patient, _End, _Waiting
from moeshard.serving.wire import LlamaReading, MoeshardReading, Reading, llama_request, moeshard_request

_log = logging.getLogger("moeshard.serving")
_T = TypeVar("_T")

_LOOK_SECONDS = 0.25
"""How often a request looks whether its node is lost meanwhile."""

_SURVEY_SECONDS = 5.0
"""How long each has at least when all are looked at before anything is served."""

MOESHARD, LLAMA_SERVER = "moeshard", "llama-server"


@dataclass(frozen=True)
class Deadlines:
    """Of requests to a node, in seconds."""

    connect: float = 2.0
    first: float = 300.0
    """Until the first piece of an answer: the prompt is computed before it."""
    between: float = 60.0
    """Between pieces."""
    total: float = 3600.0
    poll: float = 2.0
    """Between two times that a node is asked how it is."""
    health: float = 2.0
    """For the answer to that."""


Check = Callable[[Mapping[str, Any]], "str | None"]
"""Says in what a node that describes itself so is not what it should be; None where it is."""


class RemoteBackend:
    """A server somewhere else, as one that answers."""

    def __init__(
        self,
        name: str,
        url: str,
        check: Check,
        *,
        key: str = "",
        n_waiting: int = 16,
        deadlines: Deadlines | None = None,
        share_cache: bool = True,
    ):
        """Answer by the server at `url`.

        Args:
            name: of the node, or `FULL`.
            url: where it is, without a path such as /v1.
            check: looks at what a `moeshard serve` says of the experts that it holds; see `moeshard.serving.about`.
            key: the API key that it wants, if any.
            n_waiting: requests that may wait here for one of its slots.
            deadlines: how long it has.
            share_cache: whether a llama-server may use what it remembers of prompts for any other request: it does not
                part clients.
        """
        self.name, self.url = name, url
        self.kind = ""
        """`MOESHARD` or `LLAMA_SERVER`, once it has answered."""
        self.about: Mapping[str, Any] = {}
        self.renderer: RemoteBackend | None = None
        """Who makes tokens of chats for a llama-server, where somebody can."""
        self.n_ctx = 0
        self._check, self._key, self._share_cache = check, key, share_cache
        self._deadlines = deadlines or Deadlines()
        self._model = ""
        self._gate = Gate(n_waiting)
        self._health = Health(name)
        self._line: Line | None = None
        self._polls: asyncio.Task[None] | None = None
        self._poll_now = asyncio.Event()

    @property
    def fault(self) -> str | None:
        return self._health.fault

    @property
    def load(self) -> Load:
        return Load(self._gate.running, self._gate.waiting, self._gate.n_slots)

    @property
    def memory_used(self) -> float | None:
        return None

    async def start(self) -> None:
        if self._polls is None:
            self._line = self._open()
            await self._poll(self._line)
            self._polls = asyncio.ensure_future(self._keep_polling(self._line))

    async def stop(self) -> None:
        if self._polls is not None:
            self._polls.cancel()
            with suppress(asyncio.CancelledError):
                await self._polls
        if self._line is not None:
            await self._line.close()

    async def survey(self) -> None:
        """Look at it once, before anything is served.

        Raises:
            MoeshardError: it is there, and not what it should be.
        """
        line = self._open()
        try:
            await self._poll(line, strict=True)
        finally:
            await line.close()

    # Answers.

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Answer; see `Backend`."""
        end = time.monotonic() + self._deadlines.total
        async with self._gate.inside(ask.scope, self._deadlines.total):
            if self.fault is not None:
                raise NodeError("health", f"{self.name} cannot answer now: {self.fault}")
            try:
                async with aclosing(self._answer(ask, end)) as events:
                    async for event in events:
                        yield event
            except NodeError as error:
                self._failed(error)
                raise
            self._health.served()

    async def _answer(self, ask: Ask, end: float) -> AsyncGenerator[Event, None]:
        assert self._line is not None
        path, body, reading = await self._request(ask)
        found = Patient(self._line.chunks(path, body, ask.scope))
        limit = self._deadlines.first
        try:
            while reading.last is None:
                chunk = await self._next(found, limit, end)
                if isinstance(chunk, _End):
                    raise NodeError("cut", f"{self.name} ended its answer without saying why", 502)
                event = self._read(reading, chunk)
                if event is not None:
                    limit = self._deadlines.between
                    yield event
            yield reading.last
        finally:
            await found.aclose()

    def _read(self, reading: Reading, chunk: Mapping[str, Any]) -> Event | None:
        if "error" in chunk:
            error = chunk["error"]
            wrong = isinstance(error, dict) and "invalid_request" in str(error.get("type"))
            raise told(self.name, 400 if wrong else 500, chunk, {})
        try:
            return reading.event(chunk)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NodeError("answer", f"{self.name} answers what cannot be read: {error!r}", 502) from error

    async def _next(self, found: Patient[dict[str, Any]], limit: float, end: float) -> dict[str, Any] | _End:
        """Wait for the next chunk, as long as there is hope."""
        begin = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= end:
                raise timed_out(self._deadlines.total)
            if now >= begin + limit:
                raise NodeError("timeout", f"{self.name} said nothing for {limit:g} seconds", 504)
            if self._health.is_lost:
                raise NodeError("health", f"{self.name} was lost while it answered: {self.fault}")
            chunk = await found.get(min(_LOOK_SECONDS, end - now, begin + limit - now))
            if not isinstance(chunk, _Waiting):
                return chunk

    async def _request(self, ask: Ask) -> tuple[str, dict[str, Any], Reading]:
        if self.kind != LLAMA_SERVER:
            return *moeshard_request(ask, self._model), MoeshardReading()
        prompt, stop = await self._rendered(ask.prompt)
        if ask.begun:
            prompt = prompt + ask.begun if isinstance(prompt, str) else [*prompt, ask.begun]
        path, body = llama_request(ask, prompt, self._share_cache)
        body["stop"] += stop
        return path, body, LlamaReading(ask)

    async def _rendered(self, prompt: Prompt) -> tuple[str | Sequence[int | str], list[str]]:
        """Return what a llama-server is to read, and which texts end its answer beside those that were asked for."""
        if isinstance(prompt, str):
            return prompt, []
        if not isinstance(prompt[0], Message):
            return [token for token in prompt if isinstance(token, int)], []
        if self.renderer is not None and self.renderer.kind == MOESHARD and self.renderer.fault is None:
            try:
                told_ = await self.renderer.ask("/moeshard/render", prompt_json(prompt), self._deadlines.between)
                return list(map(int, told_["tokens"])), list(map(str, told_["stop"]))
            except NodeError as error:
                _log.warning("%s: chats are written by the node's own template: %s", self.name, error.message)
        found = await self.ask("/apply-template", prompt_json(prompt), self._deadlines.between)
        return str(found["prompt"]), []

    async def ask(self, path: str, body: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Post JSON and return the JSON that comes back.

        Raises:
            ApiError: it fails, or does not come in time.
        """
        try:
            return await self._ask(path, body, seconds)
        except NodeError as error:
            self._failed(error)
            raise

    def _failed(self, error: NodeError) -> None:
        """Take note of a failure, and look at once what is the matter."""
        self._health.failed(error)
        self._poll_now.set()

    async def _ask(self, path: str, body: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        assert self._line is not None
        request = asyncio.ensure_future(self._line.post(path, body))
        end = time.monotonic() + seconds
        try:
            while not request.done():
                left = end - time.monotonic()
                if left <= 0:
                    raise NodeError("timeout", f"{self.name} said nothing for {seconds:g} seconds", 504)
                if self._health.is_lost:
                    raise NodeError("health", f"{self.name} was lost meanwhile: {self.fault}")
                await asyncio.wait({request}, timeout=min(_LOOK_SECONDS, left))
            return request.result()
        finally:
            request.cancel()

    # Health.

    def _open(self) -> Line:
        return Line(self.name, self.url, self._key, self._deadlines.connect)

    async def _keep_polling(self, line: Line) -> None:
        while True:
            if not self._health.is_silent:  # else at once
                with suppress(asyncio.TimeoutError):
                    await _within(self._deadlines.poll, self._poll_now.wait())
            self._poll_now.clear()
            before = self.fault
            try:
                await self._poll(line)
            except Exception:
                _log.exception("%s cannot be looked at", self.name)
                self._health.ill("it cannot be looked at")
            if self.fault is not None:
                self._gate.refuse_all(NodeError("health", f"{self.name} cannot answer now: {self.fault}"))
            if (before is None) != (self.fault is None):
                _log.warning("%s (%s) is %s", self.name, self.url, f"down: {self.fault}" if self.fault else "up")
            await asyncio.sleep(min(0.2, self._deadlines.poll))  # however often it is asked for

    async def _poll(self, line: Line, strict: bool = False) -> None:
        bound = max(_SURVEY_SECONDS, self._deadlines.health) if strict else self._deadlines.health
        try:
            health, props = await _within(bound, _look(line))
        except asyncio.TimeoutError:
            self._health.silent(f"{self.url} does not answer within {bound:g} s")
            return
        except NodeError as error:
            self._health.ill(f"{error.message} ({self.url})")
            return
        why = self._unlike(props)
        if why is not None and strict:
            raise MoeshardError(f"--{'full' if self.name == FULL else 'node ' + self.name}: {self.url}: {why}")
        if why is None and health.status != 200:
            why = str(health.error(self.name))
        if why is None:
            self._health.well()
        else:
            self._health.ill(why)

    def _unlike(self, props: Said) -> str | None:
        """Take note of what a server says of itself; say in what it is not the one that is meant."""
        if props.status == 503:
            return None  # it is loading; its health says so
        if props.status in (401, 403):
            return str(props.error(self.name))
        found = props.body
        if isinstance(found.get("moeshard"), dict):
            self.kind, self.about = MOESHARD, found["moeshard"]
            why = self._check(self.about)
            if why is not None:
                return why
        elif "build_info" in found:
            self.kind, self.about = LLAMA_SERVER, {}
        else:
            return "is neither moeshard serve nor llama-server: GET /props says nothing of either"
        settings = found.get("default_generation_settings")
        self.n_ctx = int((settings or {}).get("n_ctx") or 0)
        self._gate.resize(max(1, int(found.get("total_slots") or 1)))
        alias = str(found.get("model_alias") or "")
        nodes = self.about.get("nodes") or {}
        self._model = f"{alias}@{self.name if self.name in nodes else FULL}" if self.kind == MOESHARD else alias
        return None


async def _within(seconds: float, work: Coroutine[Any, Any, _T]) -> _T:
    """Do something within some seconds. (Before Python 3.12 `asyncio.wait_for` may lose a cancellation.)

    Raises:
        asyncio.TimeoutError: it took longer.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()


async def _look(line: Line) -> tuple[Said, Said]:
    return await line.get("/health"), await line.get("/props")
