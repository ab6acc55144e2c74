"""Answers that come piece by piece (server-sent events), and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, Generic, TypeVar

from starlette.types import Message, Receive, Scope, Send

from moeshard.serving.errors import ApiError, failed

_T = TypeVar("_T")
_log = logging.getLogger("moeshard.serving")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Do something for a client whose request was read, and end it when the client leaves.

    Raises:
        ClientGone: it left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for future in (task, watch):
            future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Waiting:
    """Nothing came yet."""


class _End:
    """Nothing comes any more."""


class Patient(Generic[_T]):
    """A generator that can be asked for its next item without waiting for ever."""

    WAITING = _Waiting()
    END = _End()

    def __init__(self, source: AsyncGenerator[_T, None]):
        self._source = source
        self._next: asyncio.Future[_T | _End] | None = None
        self._woken: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def get(self, seconds: float) -> _T | _Waiting | _End:
        """Return the next item, `WAITING` where none comes within some seconds, or `END`."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = loop.create_task(_next(self._source, self.END))
            self._next.add_done_callback(self._wake)
        if not self._next.done():
            # One timer for all items, which looks at the latest deadline: `asyncio.wait` makes one for each.
            self._deadline = loop.time() + seconds
            if self._timer is None or self._deadline < self._timer.when():
                self._set_timer(loop)
            self._woken = loop.create_future()
            await self._woken
        if not self._next.done():
            return self.WAITING
        found, self._next = self._next, None
        return found.result()

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(self._deadline, self._late, loop)

    def _late(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if loop.time() >= self._deadline:
            self._wake()
        else:
            self._set_timer(loop)

    def _wake(self, _: object = None) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def aclose(self) -> None:
        """End the generator, whatever it does just now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._source.aclose()


async def _next(source: AsyncGenerator[_T, None], end: _End) -> _T | _End:
    return await anext(source, end)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(value: Any) -> bytes:
    """Return JSON as it is sent."""
    return _encode(value).encode("utf-8")


class EventStream:
    """An ASGI response of chunks, each a JSON object.

    The first chunk is waited for before anything is sent: a failure before it has a status of its own. Where it takes
    long, the status goes out and comments keep the line open; a failure is then, as after the first chunk, a chunk with
    ``error``, and no ``[DONE]`` follows.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        headers: Callable[[], Mapping[str, str]],
        ping_seconds: float,
        on_error: Callable[[int], None],
    ):
        """Answer by `chunks`.

        `headers` is asked when the first has come; `on_error` is told the status that a late failure would have had.
        """
        self._chunks, self._ping_seconds, self._on_error = Patient(chunks), ping_seconds, on_error
        self._own_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except (ClientGone, OSError):
            _log.info("a client left before its answer was done")

    async def _send_all(self, send: Send) -> None:
        try:
            try:
                found = await self._chunks.get(self._ping_seconds)
            except ApiError:
                raise
            except Exception as error:
                raise self._told(error) from error
            await send(self._start())
            while not isinstance(found, _End):
                await send(_body(b": still computing\n\n" if isinstance(found, _Waiting) else _event(found)))
                try:
                    found = await self._chunks.get(self._ping_seconds)
                except Exception as error:
                    await send(_body(_event(self._told(error).to_json()), more=False))
                    return
            await send(_body(b"data: [DONE]\n\n", more=False))
        finally:
            await self._chunks.aclose()

    def _told(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            _log.warning("a stream failed: %s", error.message)
            told = error
        else:
            _log.error("a stream failed", exc_info=error)
            told = failed("The answer failed.")
        self._on_error(told.status)
        return told

    def _start(self) -> Message:
        told = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            **self._own_headers(),
        }
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in told.items()]
        return {"type": "http.response.start", "status": 200, "headers": headers}


def _event(chunk: Any) -> bytes:
    return b"data: " + encode(chunk) + b"\n\n"


def _body(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def merged(sources: list[AsyncGenerator[_T, None]], at_once: int) -> AsyncGenerator[tuple[int, _T], None]:
    """Yield the items of several generators with their numbers, as they come; so many are run at once.

    What one raises ends all.
    """
    if len(sources) == 1:
        try:
            async for only in sources[0]:
                yield 0, only
        finally:
            await sources[0].aclose()
        return
    found: asyncio.Queue[tuple[int, _T] | BaseException | None] = asyncio.Queue()
    free = asyncio.Semaphore(at_once)

    async def drain(index: int) -> None:
        try:
            async with free:
                try:
                    async for item in sources[index]:
                        found.put_nowait((index, item))
                finally:
                    await sources[index].aclose()
        except Exception as error:
            found.put_nowait(error)
        else:
            found.put_nowait(None)

    tasks = [asyncio.ensure_future(drain(index)) for index in range(len(sources))]
    try:
        left = len(tasks)
        while left:
            item = await found.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
