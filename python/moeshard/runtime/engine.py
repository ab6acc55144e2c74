"""Where models are computed: in this process, or in one that may end without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import moeshard._core as _core
from moeshard.runtime.origin import LoadOptions, Origin


class Engine(Protocol):
    """Makes what `moeshard._core` makes, with the same arguments and methods."""

    @property
    def lost(self) -> bool:
        """Whether it ended, so that what it made is of no further use."""

    def close(self) -> None:
        """End it, if it is a process of its own. What lives in this process is freed when nobody uses it any more."""

    def load(self, origin: Origin, options: LoadOptions, progress: Callable[[float], object] | None) -> _core.Model:
        """Load a model."""

    def context(self, model: _core.Model, **options: Any) -> _core.Context:
        """Make a context of a model of this engine."""

    def generation(self, context: _core.Context, prompt: Any, **options: Any) -> _core.Generation:
        """Begin an answer in a context of this engine."""

    def batcher(self, model: _core.Model, **options: Any) -> _core.Batcher:
        """Make what computes many requests together."""


class LocalEngine:
    """In this process."""

    lost = False

    def close(self) -> None:
        pass

    def load(self, origin: Origin, options: LoadOptions, progress: Callable[[float], object] | None) -> _core.Model:
        return origin.load(options, progress)

    def context(self, model: _core.Model, **options: Any) -> _core.Context:
        return _core.Context(model, **options)

    def generation(self, context: _core.Context, prompt: Any, **options: Any) -> _core.Generation:
        return _core.Generation(context, prompt, **options)

    def batcher(self, model: _core.Model, **options: Any) -> _core.Batcher:
        return _core.Batcher(model, **options)
