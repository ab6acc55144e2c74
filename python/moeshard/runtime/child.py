"""The process that computes for another one, which starts it with `main`. See `moeshard.runtime.wire`."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.runtime.engine import LocalEngine
from moeshard.runtime.origin import LoadOptions, Source, find_origin
from moeshard.runtime.wire import HELD, Answer, Call, Callback, Dropped, Function, Returned, dumps, loads


class CallbackFailed(Exception):
    """A function of the other process raised; what, is known there."""


class Child:
    """Answers calls until the other end is gone."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._sending = threading.Lock()
        self._objects: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._callers: dict[int, SimpleQueue[Call]] = {}
        self._returned: dict[int, SimpleQueue[Returned]] = {}

    def run(self) -> None:
        """Read messages and pass them on; each thread of the other process has one here."""
        while True:
            try:
                message = loads(self._connection.recv_bytes(), self._resolve)
            except (EOFError, OSError):
                return
            if isinstance(message, Returned):
                self._returned[message.request].put(message)
            elif isinstance(message, Dropped):
                for target in message.targets:
                    self._objects.pop(target, None)
            else:
                self._queue(message.caller).put(message)

    def _queue(self, caller: int) -> SimpleQueue[Call]:
        if caller not in self._callers:
            calls = self._callers[caller] = SimpleQueue()
            threading.Thread(target=self._answer_all, args=(calls,), daemon=True).start()
        return self._callers[caller]

    def _answer_all(self, calls: SimpleQueue[Call]) -> None:
        while True:
            call = calls.get()
            self._send(self._answer(call))
            del call  # it may hold the last reference to something large

    def _answer(self, call: Call) -> Answer:
        self._returned[call.request] = SimpleQueue()
        try:
            return Answer(call.request, self._value(call), None)
        except StopIteration:
            return Answer(call.request, None, None, ended=True)
        except BaseException as error:
            return Answer(call.request, None, error)
        finally:
            del self._returned[call.request]

    def _value(self, call: Call) -> Any:
        arguments = [self._function(call.request, argument) for argument in call.arguments]
        options = {name: self._function(call.request, value) for name, value in call.options.items()}
        if call.target is None:
            return getattr(self, call.name)(*arguments, **options)
        target = self._objects[call.target]
        if call.name.startswith("."):
            return getattr(target, call.name[1:])
        return getattr(target, call.name)(*arguments, **options)

    # What the engine itself is asked.

    def load(self, source: Source, options: LoadOptions, progress: Callable[[float], object] | None) -> _core.Model:
        """Load a model."""
        return find_origin(**source).load(options, progress)

    context = staticmethod(LocalEngine().context)
    generation = staticmethod(LocalEngine().generation)
    batcher = staticmethod(LocalEngine().batcher)

    # The wire.

    def _function(self, request: int, value: Any) -> Any:
        if not isinstance(value, Function):
            return value

        def call(*arguments: Any) -> Any:
            self._send(Callback(request, value.number, arguments))
            returned = self._returned[request].get()
            if returned.raised:
                raise CallbackFailed
            return returned.value

        return call

    def _send(self, message: object) -> None:
        try:
            data = dumps(message, self._refer)
        except Exception as error:  # of a value or an exception
            if not isinstance(message, Answer):
                raise
            what = f"{type(message.error).__name__}: {message.error}" if message.error else str(error)
            data = dumps(Answer(message.request, None, MoeshardError(what)), self._refer)
        with self._sending:
            self._connection.send_bytes(data)

    def _refer(self, value: Any) -> tuple[str, Any] | None:
        for kind, held in HELD.items():
            if isinstance(value, held):
                number = next(self._numbers)
                self._objects[number] = value
                return kind, number
        return None

    def _resolve(self, kind: str, number: int) -> Any:
        return self._objects[number]


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    Child(Connection(int(sys.argv[1]))).run()
    os._exit(0)  # what is still computed is for nobody
