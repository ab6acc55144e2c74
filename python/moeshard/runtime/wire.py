"""What goes between a process and the one that computes for it.

Plain values, arrays and exceptions are pickled. What the engine made stays where it is, and goes as a number.
Callables stay too: calling one is a message of its own. Both ends are processes of one program, joined by a
socket that nobody else can open.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import moeshard._core as _core

HELD: dict[str, type] = {
    "Model": _core.Model,
    "Context": _core.Context,
    "Generation": _core.Generation,
    "Batcher": _core.Batcher,
}
"""The classes whose objects stay with the engine."""
_SEEN = (_core.Progress, _core.TokenLogprob)
"""Classes of results that are only looked at."""


class Call(NamedTuple):
    """Asks the engine for something; answered by an `Answer` to the same request."""

    request: int
    caller: int
    """The thread that waits. Calls of one are computed in turn, those of several at the same time."""
    target: int | None
    """A handle's number; None: the engine itself."""
    name: str
    """Of a method, or of a property behind ``.``."""
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Answer(NamedTuple):
    """The value of a call, or what it raised."""

    request: int
    value: Any
    error: BaseException | None
    ended: bool = False
    """An iterator has no further element."""


class Callback(NamedTuple):
    """The engine calls what came with a call; answered by a `Returned`."""

    request: int
    function: int
    arguments: tuple[Any, ...]


class Returned(NamedTuple):
    """What the function of a `Callback` returned, or that it raised, upon which the call is to end."""

    request: int
    value: Any
    raised: bool


class Dropped(NamedTuple):
    """Nobody holds these handles any more."""

    targets: list[int]


@dataclass(frozen=True)
class Function:
    """A callable that came with a call, in its place among the arguments."""

    number: int


def dumps(message: object, refer: Callable[[Any], tuple[str, Any] | None]) -> bytes:
    """Encode a message; `refer` names objects that stay where they are."""
    out = io.BytesIO()
    _Pickler(out, refer).dump(message)
    return out.getvalue()


def loads(data: bytes, resolve: Callable[[str, Any], Any]) -> Any:
    """Decode a message; `resolve` finds what `refer` named."""
    return _Unpickler(io.BytesIO(data), resolve).load()


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO, refer: Callable[[Any], tuple[str, Any] | None]):
        super().__init__(out, pickle.HIGHEST_PROTOCOL)
        self._refer = refer

    def persistent_id(self, obj: Any) -> tuple[str, Any] | None:
        return self._refer(obj)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _SEEN):
            names = [name for name, kind in vars(type(obj)).items() if isinstance(kind, property)]
            return _seen, ({name: getattr(obj, name) for name in names},)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: io.BytesIO, resolve: Callable[[str, Any], Any]):
        super().__init__(data)
        self._resolve = resolve

    def persistent_load(self, pid: Any) -> Any:
        return self._resolve(*pid)


def _seen(values: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**values)
