"""An engine in a process of its own: llama.cpp ends a process that loses a worker, and it must not be this one."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.runtime import child
from moeshard.runtime.layers import check_split, layer_bytes, split_layers
from moeshard.runtime.origin import LoadOptions, Origin
from moeshard.runtime.wire import HELD, Answer, Call, Callback, Dropped, Function, Returned, dumps, loads
from moeshard.runtime.workers import ask, check_workers

LOOK_SECONDS = 5.0
"""How often workers are looked at while somebody waits for them."""
SILENCE_SECONDS = 600.0
"""A call that is computed for longer, without a word, is given up."""

NOBODY = -1
"""The caller of what no thread waits for."""


class RemoteEngine:
    """Computes over workers, in a child process. See `moeshard.runtime.engine.Engine`."""

    def __init__(
        self, workers: Sequence[str], layer_split: Sequence[int] | None = None, silence: float = SILENCE_SECONDS
    ):
        """Begin a process.

        Args:
            workers: ``host:port`` of each, in the order of the layers that they take.
            layer_split: how many layers each takes; None: by the memory that they have.
            silence: seconds after which a call without an answer is given up.

        Raises:
            MoeshardError: see `moeshard.runtime.workers.check_workers`.
        """
        self._workers, self._layer_split, self._silence = list(workers), layer_split, silence
        self._memory = [worker.memory for worker in check_workers(self._workers)]
        ours, theirs = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {child.__name__} import main; main()", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                start_new_session=True,  # Ctrl-C is for the process that waits
            )
        self._connection = Connection(ours.detach())
        self._sending = threading.Lock()
        self._requests = itertools.count()
        self._waiting: dict[int, SimpleQueue[Answer | Callback | None]] = {}
        self._dropped: SimpleQueue[int] = SimpleQueue()
        self._why: str | None = None
        self._end = weakref.finalize(self, _end, self._process)
        threading.Thread(target=_read, args=(weakref.ref(self), self._connection), daemon=True).start()

    @property
    def lost(self) -> bool:
        return self._why is not None or self._process.poll() is not None

    # What an engine makes.

    def load(self, origin: Origin, options: LoadOptions, progress: Callable[[float], object] | None) -> _core.Model:
        if origin.source is None:
            raise MoeshardError("a model over workers is loaded from files, not from segments in memory")
        if self._layer_split is None:
            split = split_layers(layer_bytes(origin), self._memory, self._workers)
        else:
            split = check_split(self._layer_split, origin.layout().n_layer, len(self._workers))
        over: LoadOptions = {**options, "rpc": self._workers, "layer_split": split}
        made: _core.Model = self.call(None, "load", (origin.source, over, progress), {})
        return made

    def context(self, model: _core.Model, **options: Any) -> _core.Context:
        made: _core.Context = self.call(None, "context", (model,), options)
        return made

    def generation(self, context: _core.Context, prompt: Any, **options: Any) -> _core.Generation:
        made: _core.Generation = self.call(None, "generation", (context, prompt), options)
        return made

    def batcher(self, model: _core.Model, **options: Any) -> _core.Batcher:
        made: _core.Batcher = self.call(None, "batcher", (model,), options)
        return made

    def close(self) -> None:
        """End the process."""
        self._why = self._why or "it was closed"
        self._end()

    # Calls.

    def call(self, target: int | None, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return what the engine answers; raises what it raises, or a MoeshardError that names the worker it lost."""
        functions: list[Callable[..., object]] = []

        def named(value: Any) -> Any:
            if not callable(value) or isinstance(value, Proxy):
                return value
            functions.append(value)
            return Function(len(functions) - 1)

        arguments = tuple(named(value) for value in arguments)
        options = {name: named(value) for name, value in options.items()}
        request = next(self._requests)
        answers: SimpleQueue[Answer | Callback | None] = SimpleQueue()
        self._waiting[request] = answers
        try:
            self._send(Call(request, threading.get_ident(), target, name, arguments, options))
            return self._wait(request, answers, functions)
        except KeyboardInterrupt:
            if target is not None and not self.lost:  # nobody waits for the rest
                self._send(Call(next(self._requests), NOBODY, target, "abort", (), {}))
            raise
        finally:
            del self._waiting[request]

    def _wait(
        self,
        request: int,
        answers: SimpleQueue[Answer | Callback | None],
        functions: list[Callable[..., object]],
    ) -> Any:
        raised: BaseException | None = None
        heard = time.monotonic()
        while True:
            try:
                message = answers.get(timeout=LOOK_SECONDS)
            except Empty:
                self._look(time.monotonic() - heard)
                continue
            heard = time.monotonic()
            if message is None:
                raise self._gone()
            if isinstance(message, Callback):
                value = None
                try:
                    value = functions[message.function](*message.arguments)
                except BaseException as error:
                    raised = error
                self._send(Returned(request, value, raised is not None))
                continue
            if raised is not None:
                raise raised
            if message.ended:
                raise StopIteration
            if message.error is not None:
                raise message.error
            return message.value

    def _send(self, message: object) -> None:
        data = dumps(message, _refer)
        dropped = []
        while not self._dropped.empty():
            dropped.append(self._dropped.get())
        try:
            with self._sending:
                if dropped:
                    self._connection.send_bytes(dumps(Dropped(dropped), _refer))
                self._connection.send_bytes(data)
        except OSError:
            raise self._gone() from None

    def drop(self, number: int) -> None:
        """Note that nobody holds a handle any more; said with the next call, as this may be the garbage collector's."""
        self._dropped.put(number)

    def _look(self, waited: float) -> None:
        """While there is no answer: raise where one is not to be expected any more."""
        lost = self._lost_workers()
        if not lost and waited < self._silence:
            return
        self.give_up("; ".join(lost) or f"nothing was heard for {waited:.0f} s, though all workers answer")
        raise self._gone()

    def _lost_workers(self) -> list[str]:
        lost = []
        for worker in self._workers:
            try:
                ask(worker)
            except MoeshardError as error:
                lost.append(str(error))
        return lost

    def _gone(self) -> MoeshardError:
        """Say why there will be no answer. What was computed is lost; a model is loaded again when it is next used."""
        if self._why is None:
            self._process.wait()
            lost = self._lost_workers()
            self._why = "; ".join(lost) or f"its process ended with code {self._process.returncode}{self._last_words()}"
        return MoeshardError(
            f"the engine over {', '.join(self._workers)} was lost: {self._why}. The model is loaded again at the next "
            f"call"
        )

    def _last_words(self) -> str:
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(self._said.tell() - 2000, 0))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f", saying: {lines[-1]}" if lines else ""

    def resolve(self, kind: str, number: int) -> Any:
        """Return what stands here for an object of the engine."""
        return Proxy(self, number, kind)

    def deliver(self, message: Answer | Callback) -> None:
        """Pass on what the engine says."""
        waiting = self._waiting.get(message.request)
        if waiting is not None:  # else whoever asked was interrupted
            waiting.put(message)

    def give_up(self, why: str) -> None:
        """End the process for a reason."""
        self._why = why
        self.close()

    def ended(self) -> None:
        """Wake up everybody: the process is gone."""
        for waiting in list(self._waiting.values()):
            waiting.put(None)


def _refer(value: Any) -> tuple[str, Any] | None:
    return (value.kind, value.number) if isinstance(value, Proxy) else None


def _read(engine: weakref.ref[RemoteEngine], connection: Connection) -> None:
    """Pass on what comes, until the process or the engine is gone."""
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            break
        reader = engine()
        if reader is None:
            return
        try:
            reader.deliver(loads(data, reader.resolve))
        except Exception as error:  # whoever waits must hear of it
            reader.give_up(f"its answer cannot be read: {error}")
            break
        del reader
    reader = engine()
    if reader is not None:
        reader.ended()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


class Proxy:
    """Stands for an object of the engine: has its methods and properties."""

    def __init__(self, engine: RemoteEngine, number: int, kind: str):
        self._engine, self.number, self.kind = engine, number, kind

    @property
    def lost(self) -> bool:
        """Whether the engine is gone, and this with it."""
        return self._engine.lost

    def __getattr__(self, name: str) -> Any:
        # Of the class that it stands for; an AttributeError where there is no such thing.
        if isinstance(getattr(HELD[self.kind], name), property):
            return self._engine.call(self.number, f".{name}", (), {})
        return partial(self._call, name)

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return self._engine.call(self.number, name, arguments, options)

    def __iter__(self) -> Proxy:
        return self

    def __next__(self) -> Any:
        return self._call("__next__")

    def __del__(self) -> None:
        self._engine.drop(self.number)
