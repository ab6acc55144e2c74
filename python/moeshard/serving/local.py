"""Answers from this process: all nodes of a plan as masks on one model, computed by one thread."""

from __future__ import annotations

import codecs
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.keep.text import Keep
from moeshard.placement.nodes import by_model, plan_nodes
from moeshard.planning.plan import Plan
from moeshard.runtime.model import Model
from moeshard.serving.about import about
from moeshard.serving.backends import FULL, Ask, Event, Finish, Load, Scored
from moeshard.serving.engine import Engine
from moeshard.serving.errors import invalid, too_long
from moeshard.serving.inner import Inner
from moeshard.serving.jobs import Job, Lane
from moeshard.serving.moving import Tally
from moeshard.serving.probing import LocalProber
from moeshard.serving.protocol import Options
from moeshard.serving.rendering import Rendered, Renderer, rendered

_FINISH: dict[str, Finish] = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass(frozen=True)
class LocalOptions:
    """What the engine of this process is given."""

    n_slots: int = 4
    """Requests computed at once, over all nodes."""
    n_ctx: int | None = None
    """Tokens that each can hold; None: those of the model."""
    n_waiting: int = 64
    """Requests that may wait for a slot."""
    n_probe: int = 256
    """Of a session's first turn, so many last tokens are looked at to place it."""
    seconds: float = 3600.0
    """After so many an answer is given up."""
    template: str = ""
    """A chat template, by name or text, instead of the model's own."""


class LocalBackend:
    """A node of the plan, or the whole model, in this process's engine."""

    def __init__(
        self, name: str, engine: Engine, lane: Lane, model: Model, renderer: Renderer, keep: Keep | None, seconds: float
    ):
        """Answer with `model` under `keep`, by the engine's `lane`."""
        self.name = name
        self._engine, self._lane, self._model, self._renderer = engine, lane, model, renderer
        self._keep, self._seconds = keep, seconds
        self._siblings: dict[str, LocalBackend] = {}
        """All that share the engine, by name."""
        self._jobs: set[Job] = set()
        # A vocabulary's tokens are told over and over.
        self._bytes = lru_cache(maxsize=65536)(model.token_bytes)

    @property
    def fault(self) -> str | None:
        return self._engine.fault

    @property
    def load(self) -> Load:
        running = sum(job.id >= 0 for job in self._jobs)
        return Load(running, len(self._jobs) - running, self._lane.n_slots)

    @property
    def n_ctx(self) -> int:
        return self._lane.n_ctx

    @property
    def memory_used(self) -> float:
        return self._lane.n_held / (self._lane.n_slots * self._lane.n_ctx)

    async def start(self) -> None:
        self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Answer; see `Backend`."""
        prompt = await rendered(self._renderer, ask.prompt)
        options = ask.options
        if not prompt.tokens.size:
            raise invalid("The prompt is empty.", "prompt")
        if ask.begun:
            begun = self._model.tokenize(ask.begun, special=False)
            prompt = replace(prompt, tokens=np.concatenate([prompt.tokens, begun]))
        if prompt.tokens.size > self._lane.n_ctx:
            raise too_long(prompt.tokens.size, self._lane.n_ctx)
        job = self._engine.submit(
            self._lane,
            self._seconds,
            prompt=prompt.tokens,
            keep=self._keep,
            scope=ask.scope,
            max_tokens=options.max_tokens,
            stop=[*options.stop, *prompt.stop],
            ignore_end=options.ignore_end,
            n_logprobs=options.n_logprobs,
            prompt_logprobs=options.echo and options.n_logprobs >= 0,
            sampling=_sampling(options),
        )
        at, watch = self, ask.watch
        at._jobs.add(job)
        steps = job.steps()
        reading = _Reading(self._bytes, prompt, ask)
        if watch is not None:
            watch.begin(prompt.tokens)
        try:
            async for found in steps:
                event = reading.event(found)
                if event is not None:
                    yield event
                if watch is not None and watch.target is not None and not job.ended:
                    to = self._siblings[watch.target.backend]
                    if await self._engine.move(job, to._lane, to._keep):
                        at._jobs.discard(job)
                        at = to
                        at._jobs.add(job)
                        watch.arrived()
                        reading.tally = Tally(len(watch.tokens))
                    else:
                        watch.refused()
        finally:
            at._jobs.discard(job)
            if watch is not None:
                watch.end()
            await steps.aclose()


@dataclass
class _Reading:
    """Turns what steps did into events."""

    token_bytes: Any
    rendered: Rendered
    ask: Ask
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )
    prompt: list[Scored] = field(default_factory=list)
    began: bool = False
    tally: Tally = field(default_factory=Tally)

    def event(self, found: Sequence[_core.Progress]) -> Event | None:
        """Return what there is to tell after these steps."""
        last = found[-1]
        self._measure(found)
        text = "".join(self.decoder.decode(step.text, final=step.over) for step in found)
        scored = self._scored(found)
        if last.n_prompt_done < last.n_prompt or not (text or scored or last.over):
            return None
        prompt_text = "" if self.began else self._prompt_text()
        prompt, self.prompt, self.began = tuple(self.prompt), [], True
        return Event(
            text=text,
            n_prompt=last.n_prompt,
            n_cached=last.n_cached,
            n_generated=last.n_generated,
            logprobs=tuple(scored),
            prompt_logprobs=prompt,
            prompt_text=prompt_text,
            finish=_FINISH.get(last.stop_reason),
            missed=self.tally.mean,
        )

    def _measure(self, found: Sequence[_core.Progress]) -> None:
        for step in found:
            missed = self.tally.add(step.missed)
            if self.ask.watch is not None:
                self.ask.watch.add(step.token if step.token >= 0 else None, missed)

    def _scored(self, found: Sequence[_core.Progress]) -> list[Scored]:
        """Put the log-probabilities of the prompt aside and return the answer's."""
        all_of_them = [
            Scored(
                entry.token,
                entry.bytes,
                entry.logprob,
                tuple((self.token_bytes(token), logprob) for token, logprob in entry.top),
            )
            for step in found
            for entry in step.logprobs
        ]
        if not (self.ask.options.echo and self.ask.options.n_logprobs >= 0) or self.began:
            return all_of_them
        if not self.prompt:
            first = int(self.rendered.tokens[0])
            self.prompt.append(Scored(first, self.token_bytes(first), None))
        missing = self.rendered.tokens.size - len(self.prompt)
        self.prompt += all_of_them[:missing]
        return all_of_them[missing:]

    def _prompt_text(self) -> str:
        if not self.ask.options.echo:
            return ""
        if isinstance(self.ask.prompt, str):
            return self.ask.prompt
        pieces = [self.token_bytes(int(token)) for token in self.rendered.tokens]
        return b"".join(pieces).decode("utf-8", errors="replace")


def _sampling(options: Options) -> _core.SamplingParams:
    return _core.SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repeat_penalty=options.repeat_penalty,
        repeat_last_n=options.repeat_last_n,
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        logit_bias=options.logit_bias,
        grammar=options.grammar,
        seed=options.seed,
    )


@dataclass(frozen=True, eq=False)
class Local:
    """What this process serves."""

    backends: list[LocalBackend]
    """The whole model first, then the nodes in the order of the plan."""
    prober: LocalProber | None
    """Of all nodes; None without a plan."""
    engine: Engine
    renderer: Renderer
    model: Model
    inner: Inner
    """What gateways ask for; without a plan the model alone is measured."""

    async def start(self) -> None:
        """Begin to compute for the running event loop."""
        self.engine.start()

    async def stop(self) -> None:
        """End what runs."""
        await self.engine.stop()


def serve_locally(model: Model, plan: Plan | None, options: LocalOptions, keep: Keep | None = None) -> Local:
    """Make the engine for a model and the nodes of a plan.

    Args:
        model: the whole model.
        plan: its nodes; None: there is nothing but the model.
        options: of the engine.
        keep: without a plan: the experts that the model may use.

    Raises:
        MoeshardError: the plan is of another model, or names a node ``full``.
    """
    renderer = Renderer(model, options.template)
    names = [node.name for node in plan.nodes] if plan is not None else []
    if any(re.fullmatch(FULL, name, re.IGNORECASE) for name in names):
        raise MoeshardError(f"a node of the plan is called '{FULL}', which means the whole model; give it another name")
    nodes = plan_nodes(model, plan) if plan is not None else []
    serving, probing = [], []
    backends: dict[int, LocalBackend] = {}
    engine = Engine([])
    for shared, own in by_model(model, nodes):
        lane = Lane(partial(shared.batcher, options.n_slots, options.n_ctx, meter=True), options.n_waiting)
        serving.append(lane)
        for index, mask in own:
            own_keep = mask if nodes else keep
            backends[-1 if index is None else index] = LocalBackend(
                FULL if index is None else names[index], engine, lane, shared, renderer, own_keep, options.seconds
            )
        if nodes:
            # A step of a probe is what all others wait for: a part of the prompt of one node.
            probe = Lane(partial(shared.batcher, len(own), options.n_probe, n_prefill=options.n_probe), 0)
            probing.append((probe, own))
    engine.lanes = [*serving, *(lane for lane, _ in probing)]
    for backend in backends.values():
        backend._siblings = {other.name: other for other in backends.values()}
    prober = LocalProber(
        engine,
        # Alone the model measures among what it answers: that needs no memory of its own.
        probing or [(serving[0], [(None, keep)])],
        renderer,
        n_probe=options.n_probe,
        n_waiting=options.n_waiting,
        seconds=options.seconds,
    )
    return Local(
        [backends[position] for position in sorted(backends)],
        prober if nodes else None,
        engine,
        renderer,
        model,
        Inner(prober, renderer, about(model, plan, nodes, options.n_probe)),
    )
