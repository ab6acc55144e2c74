"""Contexts of a model. They are costly to make, so idle ones are kept for the next who needs one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.runtime.engine import Engine
from moeshard.runtime.limits import MAX_INT32

CTX_STEP = 256
IDLE_CONTEXTS = 2


class ContextPool:
    """The contexts of one model. Safe to use from several threads."""

    def __init__(self, engine: Engine, model: _core.Model, n_ctx: int, **options: Any):
        """Begin with none.

        Args:
            engine: which computes.
            model: whose contexts these are.
            n_ctx: tokens that a lone sequence is given, where not more are asked for.
            options: of every context.
        """
        self._engine, self._model, self._n_ctx, self._options = engine, model, n_ctx, options
        self._idle: list[_core.Context] = []
        self._lock = threading.Lock()
        # The garbage collector may end a session while this thread holds the lock: what is given back goes to where it
        # can be put without one.
        self._returned: SimpleQueue[_core.Context] = SimpleQueue()
        self._process = os.getpid()
        self._closed = False

    def take(self, n_seq: int, n_ctx: int) -> Lease:
        """Return a context of `n_seq` sequences that hold `n_ctx` tokens each, without keeps and empty.

        Raises:
            MoeshardError: it cannot be made, the pool is closed, or belongs to a process that this one was forked from.
        """
        if os.getpid() != self._process:
            # The locks may be held for ever by threads that stayed behind.
            raise MoeshardError(
                "the model was loaded before this process was forked, and the engine's threads stayed behind; load it "
                "in the new process, or start that with the method 'spawn'"
            )
        with self._lock:
            if self._closed:
                raise MoeshardError("the model is closed")
            self._collect()
            fitting = (c for c in self._idle if c.n_seq_max == n_seq and c.capacity >= n_ctx)
            context = min(fitting, key=lambda c: c.capacity, default=None)
            if context is not None:
                self._idle.remove(context)
        if context is None:
            context = self._make(n_seq, n_ctx)
        context.limit(n_ctx)
        return Lease(context, self)

    def _make(self, n_seq: int, n_ctx: int) -> _core.Context:
        # Several sequences are given their length; a single one may serve a longer text next.
        wanted = n_ctx if n_seq > 1 else max(n_ctx, self._n_ctx)
        steps = -(-wanted // CTX_STEP)
        if steps > MAX_INT32 // CTX_STEP:
            most = MAX_INT32 // CTX_STEP * CTX_STEP
            raise MoeshardError(f"a context of {wanted} tokens is too long: the engine takes {most} at most")
        size = steps * CTX_STEP
        try:
            return self._engine.context(self._model, n_ctx=size, n_seq_max=n_seq, **self._options)
        except MoeshardError:
            # What idle ones hold may be what is missing.
            with self._lock:
                idle, self._idle = self._idle, []
            if not idle:
                raise
            del idle
            return self._engine.context(self._model, n_ctx=size, n_seq_max=n_seq, **self._options)

    def close(self) -> None:
        """Free what is idle, and whatever is given back from now on. Nothing can be taken any more."""
        with self._lock:
            self._closed = True
            self._collect()
            self._idle.clear()

    def give_back(self, context: _core.Context) -> None:
        """Take a context that nobody computes in any more."""
        try:
            context.reset()
            context.set_meter(False)
            for seq in range(-1, context.n_seq_max):
                context.set_keep(None, seq)
        except MoeshardError:
            return  # it failed inside the engine, or belongs to another process, and is of no further use
        if not self._closed:
            self._returned.put(context)

    def _collect(self) -> None:
        while True:
            try:
                self._idle.append(self._returned.get_nowait())
            except Empty:
                break
        del self._idle[:-IDLE_CONTEXTS]


class Lease:
    """A context for as long as one session or answer needs it; afterwards it belongs to somebody else."""

    def __init__(self, context: _core.Context, pool: ContextPool):
        self._context: _core.Context | None = context
        self._pool = pool
        self._in_use = threading.Lock()
        self._closing = False

    @property
    def context(self) -> _core.Context:
        """The context, to be looked at.

        Raises:
            MoeshardError: it was given back.
        """
        if self._context is None or self._closing:
            raise MoeshardError("the session is closed: its context may belong to another one; open a new session")
        return self._context

    @contextmanager
    def computing(self) -> Iterator[_core.Context]:
        """Give the context to one thread, to compute in or to change.

        Raises:
            MoeshardError: it was given back, or another thread computes in it.
        """
        if not self._in_use.acquire(blocking=False):
            raise MoeshardError("another thread computes in this session; give each thread a session of its own")
        try:
            yield self.context
        finally:
            self._in_use.release()
            if self._closing:
                self.close()

    def close(self) -> None:
        """Give the context back, once the thread that computes in it has ended."""
        self._closing = True
        if not self._in_use.acquire(blocking=False):
            return  # that thread does it
        try:
            context, self._context = self._context, None
        finally:
            self._in_use.release()
        if context is not None:
            self._pool.give_back(context)
