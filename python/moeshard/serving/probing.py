"""What a session's first turn costs the nodes of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from moeshard.arrays import Doubles, Tokens
from moeshard.keep.text import Keep
from moeshard.placement.decision import MIN_TOKENS
from moeshard.serving.engine import Engine
from moeshard.serving.errors import busy
from moeshard.serving.jobs import Job, Lane
from moeshard.serving.placer import Losses
from moeshard.serving.protocol import Prompt
from moeshard.serving.rendering import Renderer, rendered

CONTEXT = 64
"""Tokens before those that decide where a session goes on, that these are predicted after."""

Part: TypeAlias = "tuple[Lane, list[tuple[int | None, Keep | None]]]"
"""What one lane predicts for: nodes by their number in the plan (None: the whole model), each under a keep."""


class LocalProber:
    """Predicts the first turn of a session on the whole model and on every node, in batches of their own.

    One session after the other, each from empty sequences: what is found hangs on nothing but plan and turn.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Sequence[Part],
        renderer: Renderer,
        *,
        n_probe: int,
        n_waiting: int,
        seconds: float,
    ):
        """Predict by the engine's lanes in `parts`.

        Of a turn the last `n_probe` tokens are looked at, `n_waiting` sessions may wait for that, and after `seconds` a
        probe is given up.
        """
        self._engine, self._parts, self._renderer = engine, parts, renderer
        self._n_probe, self._may_wait, self._seconds = n_probe, n_waiting, seconds
        self._n_nodes = sum(len(own) for _, own in parts) - 1
        self._turn = asyncio.Lock()
        self._n_waiting = 0

    async def losses(self, prompt: Prompt) -> Losses:
        """Predict a prompt.

        Raises:
            ApiError: too many sessions wait to be placed, or the engine failed.
        """
        if self._n_waiting > self._may_wait:
            raise busy(1)
        tokens = (await rendered(self._renderer, prompt, answer=False)).tokens
        seen = tokens[-min(self._n_probe, *(lane.n_ctx for lane, _ in self._parts)) :]
        if seen.size < MIN_TOKENS:
            return Losses(np.empty((self._n_nodes, 0)), np.empty(0), n_tokens=seen.size, n_cut=0)
        # Not cancelled by one who leaves: the next probe begins with all slots free, in the same order.
        found = await asyncio.shield(asyncio.ensure_future(self._in_turn(seen)))
        return Losses(found[1:], found[0], n_tokens=seen.size, n_cut=tokens.size - seen.size)

    async def latest(self, tokens: Tokens, n: int) -> Losses:
        """Predict the last `n` of these tokens, after what comes before them.

        Raises:
            ApiError: as `losses`.
        """
        if self._n_waiting > self._may_wait:
            raise busy(1)
        n = min(n, self._n_probe - 1, tokens.size - 1)
        seen = tokens[-min(n + CONTEXT, self._n_probe) :]
        found = (await asyncio.shield(asyncio.ensure_future(self._in_turn(seen))))[:, -n:]
        return Losses(found[1:], found[0], n_tokens=n, n_cut=tokens.size - n)

    async def _in_turn(self, tokens: Tokens) -> Doubles:
        self._n_waiting += 1
        try:
            async with self._turn:
                return await self._probe(tokens)
        finally:
            self._n_waiting -= 1

    async def _probe(self, tokens: Tokens) -> Doubles:
        jobs: dict[int, Job] = {}
        found = np.empty((1 + self._n_nodes, tokens.size - 1))
        try:
            for lane, nodes in self._parts:
                for index, keep in nodes:
                    jobs[0 if index is None else 1 + index] = self._engine.submit(
                        lane, self._seconds, prompt=tokens, keep=keep, max_tokens=0, prompt_logprobs=True
                    )
            for row, job in jobs.items():
                told = [entry.logprob async for steps in job.steps() for step in steps for entry in step.logprobs]
                found[row] = np.negative(told)
        finally:
            for job in jobs.values():
                job.cancel()
        return found
