"""From a request to its answers: who is asked for, who has the session, what comes of it. Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from moeshard.serving.backends import FULL, Ask, Backend, Event
from moeshard.serving.decision import Decision
from moeshard.serving.errors import ApiError, unavailable, unknown_model
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

    def __init__(self, model: str, placer: Placer, backends: Sequence[Backend]):
        """Serve under the name `model`."""
        self.model, self._placer = model, placer
        self.backends = {backend.name: backend for backend in backends}
        self.metrics = Metrics(model, self._gauges)

    async def start(self) -> None:
        for backend in self.backends.values():
            await backend.start()

    async def stop(self) -> None:
        for backend in self.backends.values():
            await backend.stop()

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

    async def place(self, request: Request, client: Client) -> Decision:
        """Say who answers a request; all its prompts go where the first one belongs.

        Raises:
            ApiError: 404, or 503 where nobody can.
        """
        forced = self.wanted(request.model)
        if forced is not None:
            fault = self.backends[forced].fault
            if fault is not None:
                raise unavailable(f"{forced} cannot answer now: {fault}", "node_down")
            return Decision(forced, "forced", "The request asked for it by name.", None)
        key = session_key(client.scope, self.model, client.headers, request)
        decision, new = await self._placer.place(key, request.prompts[0], self._states, self.metrics.probed)
        if new:
            self.metrics.placed(decision.backend, decision.reason, decision.fit)
        return decision

    async def answers(
        self, request: Request, decision: Decision, client: Client
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield what comes of each prompt of a request, with the prompt's number."""
        backend = self.backends[decision.backend]
        watch = self._watch(request, decision, client)
        asks = [Ask(prompt, request.options, client.scope, watch) for prompt in request.prompts]
        streams = [self._counted(backend.stream(ask), client.begin, decision.backend) for ask in asks]
        async with aclosing(merged(streams, backend.load.slots)) as events:
            async for event in events:
                yield event

    def _watch(self, request: Request, decision: Decision, client: Client) -> Watch | None:
        """What may move the answer; None where its node has no limits, or it is one of several."""
        limits, prober = self._placer.limits, self._placer.prober
        movable = decision.backend in limits and decision.reason != "forced" and len(request.prompts) == 1
        if not movable or not isinstance(prober, LatestProber):
            return None
        key = session_key(client.scope, self.model, client.headers, request)
        return Watch(Ways(self._placer, prober, limits, self._states, self.metrics.moved), key, decision)

    async def _counted(
        self, events: AsyncGenerator[Event, None], begin: float, node: str
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
                self.metrics.missed(last.moved.backend if last.moved else node, last.missed)
            self.metrics.ended(before - begin, last.n_prompt, last.n_cached, last.n_generated, reason)

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
        yield "kv_cache_usage_perc", "Share of the tokens that slots can hold, 1 is all", {}, max(used)

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
