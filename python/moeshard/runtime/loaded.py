"""A model in its engine: loaded once, and again where the engine was lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.runtime.contexts import ContextPool
from moeshard.runtime.engine import Engine, LocalEngine
from moeshard.runtime.limits import DEFAULT_CTX
from moeshard.runtime.origin import LoadOptions, Origin


class Loaded(NamedTuple):
    """A model, and what computes with it."""

    engine: Engine
    native: _core.Model
    n_ctx: int
    contexts: ContextPool


class Holder:
    """Loads a model, and holds it until it is closed. Safe to use from several threads."""

    def __init__(
        self,
        origin: Origin,
        options: LoadOptions,
        context_options: dict[str, int],
        n_ctx: int | None,
        progress: Callable[[float], object] | None,
    ):
        """Load it.

        Args:
            origin: what is loaded.
            options: how. With workers (``rpc``) it is loaded into a process of its own.
            context_options: of every context.
            n_ctx: tokens that a lone sequence can hold; None: what the model was trained on, at most `DEFAULT_CTX`.
            progress: called with the fraction loaded.
        """
        self._origin, self._options, self._context_options = origin, options, context_options
        self._lock = threading.Lock()
        self._loaded: Loaded | None = self._load(n_ctx, progress)
        self.n_ctx = self._loaded.n_ctx

    def _load(self, n_ctx: int | None, progress: Callable[[float], object] | None) -> Loaded:
        engine: Engine = LocalEngine()
        options = self._options
        if options["rpc"]:
            from moeshard.runtime.remote import RemoteEngine

            engine = RemoteEngine(options["rpc"], options["layer_split"])
        native = engine.load(self._origin, options, progress)
        n_ctx = n_ctx or min(native.n_ctx_train or DEFAULT_CTX, DEFAULT_CTX)
        return Loaded(engine, native, n_ctx, ContextPool(engine, native, n_ctx, **self._context_options))

    def get(self) -> Loaded:
        """Return it, loaded again where its engine was lost.

        Raises:
            MoeshardError: it was closed, or cannot be loaded again.
        """
        loaded = self._loaded
        if loaded is not None and loaded.engine.lost:
            with self._lock:
                if self._loaded is loaded:
                    self._loaded = self._load(self.n_ctx, None)
                loaded = self._loaded
        if loaded is None:
            raise MoeshardError(f"{self._origin.path}: the model is closed; load it again")
        return loaded

    def close(self) -> None:
        """Let go of it."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.contexts.close()
            loaded.engine.close()
