"""From a request to its answers: who is asked for, who has the session, what comes of it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from moeshard.placement.meter import FEWEST_TOKENS
from moeshard.serving.backends import FULL, Ask, Backend, Event
from moeshard.serving.decision import Decision
from moeshard.serving.errors import ApiError, unavailable, unknown_model
from moeshard.serving.failover import Course, carried, is_wanted
from moeshard.serving.metrics import Metrics, Reading
from moeshard.serving.moving import LatestProber, Watch, Ways
from moeshard.serving.placer import Placer, State, session_key
from moeshard.serving.protocol import Request
from moeshard.serving.stream import merged


@dataclass(frozen=True)
class Client:
    """Who asks."""

    scope: str
    """Of its API key; see `moeshard.serving.auth.Keys.scope`."""
    headers: Mapping[str, str]
    """Names in lower case."""
    begin: float = field(default_factory=time.monotonic)
    """When it asked."""


class Service:
    """Answers requests by backends, one of which the placer chooses."""

    def __init__(self, model: str, placer: Placer, backends: Sequence[Backend], resume: bool = False):
        """Serve under the name `model`; `resume`: see `moeshard.serving.settings.Settings`."""
        self.model, self._placer, self._resume = model, placer, resume
        self.backends = {backend.name: backend for backend in backends}
        self.metrics = Metrics(model, self._gauges)

    async def start(self) -> None:
        await asyncio.gather(*(backend.start() for backend in self.backends.values()))

    async def stop(self) -> None:
        await asyncio.gather(*(backend.stop() for backend in self.backends.values()))

    @property
    def fault(self) -> str | None:
        """Why nobody can be served; None where somebody can."""
        faults = [backend.fault for backend in self.backends.values()]
        return None if None in faults else faults[0]

    def models(self) -> list[str]:
        """Return the names that requests can ask for: the model, which is placed, and who may be asked by force."""
        return [self.model, *(f"{self.model}@{name}" for name in self.backends)]

    def wanted(self, name: str | None) -> str | None:
        """Return the backend that a request's model names, None where it is to be placed.

        Raises:
            ApiError: 404.
        """
        if name is None or name == self.model:
            return None
        model, _, backend = name.rpartition("@")
        if model == self.model and backend in self.backends:
            return backend
        raise unknown_model(name, self.model)

    async def place(self, request: Request, client: Client) -> Course:
        """Say who answers a request; all its prompts go where the first one belongs.

        Raises:
            ApiError: 404, or 503 where nobody can.
        """
        forced = self.wanted(request.model)
        if forced is not None:
            fault = self.backends[forced].fault
            if fault is not None:
                raise unavailable(f"{forced} cannot answer now: {fault}", "node_down")
            return Course(Decision(forced, "forced", "The request asked for it by name.", None))
        key = session_key(client.scope, self.model, client.headers, request)
        decision, new = await self._placer.place(
            key, request.prompts[0], self._states, self.metrics.probed, self.metrics.moved
        )
        if new:
            self.metrics.placed(decision.backend, decision.reason, decision.fit)
        return Course(decision, key)

    async def answers(
        self, request: Request, course: Course, client: Client
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield what comes of each prompt of a request, with the prompt's number."""
        resume = is_wanted(client.headers.get("x-moeshard-resume", ""), self._resume)
        watch = self._watch(request, course)
        asks = [Ask(prompt, request.options, client.scope, watch, request.begun) for prompt in request.prompts]
        streams = [
            self._counted(
                carried(ask, course, self.backends, self._instead, whole=not request.stream, resume=resume),
                client.begin,
                course,
                watch is None,
            )
            for ask in asks
        ]
        async with aclosing(merged(streams, self.backends[course.decision.backend].load.slots)) as events:
            async for event in events:
                yield event

    def _watch(self, request: Request, course: Course) -> Watch | None:
        """What may move the answer; None where its node has no limits, or it is one of several."""
        limits, prober = self._placer.limits, self._placer.prober
        movable = course.key is not None and course.decision.backend in limits and len(request.prompts) == 1
        if not movable or not isinstance(prober, LatestProber):
            return None

        def moved(source: str, decision: Decision) -> None:
            course.decision = decision
            self.metrics.moved(source, decision.backend)

        assert course.key is not None
        return Watch(Ways(self._placer, prober, limits, self._states, moved), course.key, course.decision)

    def _instead(self, course: Course, name: str, error: ApiError) -> Decision | None:
        course.failed.add(name)
        assert course.key is not None
        decision = self._placer.instead(course.key, course.failed, self._states())
        if decision is not None:
            self.metrics.failed_over(name, getattr(error, "cause", error.code or "error"))
        return decision

    async def _counted(
        self, events: AsyncGenerator[Event, None], begin: float, course: Course, unwatched: bool
    ) -> AsyncGenerator[Event, None]:
        before, last, reason = begin, Event(), "abort"
        try:
            async with aclosing(events):
                async for event in events:
                    now = time.monotonic()
                    n = event.n_generated - last.n_generated
                    if last.n_generated == 0:
                        self.metrics.first_token(now - begin)
                    elif n:
                        self.metrics.next_tokens(n, now - before)
                    before, last, reason = now, event, event.finish or "abort"
                    yield event
        except ApiError:
            reason = "error"
            raise
        finally:
            if last.missed is not None:
                self.metrics.missed(course.decision.backend, last.missed)
                if unwatched:
                    self._doubt(course, last)
            self.metrics.ended(before - begin, last.n_prompt, last.n_cached, last.n_generated, reason)

    def _doubt(self, course: Course, last: Event) -> None:
        """Where an answer could not be moved while it was written, its session may be before the next one."""
        limits = self._placer.limits.get(course.decision.backend)
        n_tokens = last.n_prompt - last.n_cached + last.n_generated
        if course.key is None or limits is None or last.missed is None or n_tokens < FEWEST_TOKENS:
            return
        if last.missed > limits.reference:
            self._placer.doubt(course.key)

    def _states(self) -> dict[str, State]:
        return {name: State(one.fault is None, one.load.share) for name, one in self.backends.items()}

    def _gauges(self) -> Iterable[Reading]:
        running = waiting = 0
        for name, backend in self.backends.items():
            load = backend.load
            running, waiting = running + load.running, waiting + load.waiting
            yield "node_up", "Whether a node can answer", {"node": name}, float(backend.fault is None)
            yield "node_load", "Requests of a node for each slot", {"node": name}, load.share
        yield "num_requests_running", "Requests that are computed", {}, float(running)
        yield "num_requests_waiting", "Requests that wait for a slot", {}, float(waiting)
        used = [backend.memory_used for backend in self.backends.values()]
        known = [share for share in used if share is not None]
        if known:
            yield "kv_cache_usage_perc", "Share of the tokens that slots can hold, 1 is all", {}, max(known)

    def nodes(self) -> list[dict[str, object]]:
        """Return what there is to see of each backend."""
        return [
            {
                "name": name,
                "up": backend.fault is None,
                "fault": backend.fault,
                "running": backend.load.running,
                "waiting": backend.load.waiting,
                "slots": backend.load.slots,
                "whole": name == FULL,
            }
            for name, backend in self.backends.items()
        ]
