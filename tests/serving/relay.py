"""A line to a server that can be told to fail in ways in which no process fails by itself."""

from __future__ import annotations

import asyncio
import threading
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["", "silent", "stall", "cut", "end", "garble"]
"""Nothing; no answer at all; no more after some bytes; broken off after these; ended as if it were whole; other bytes.
Questions about health and properties are answered nevertheless."""

_EVENT_END = b"\n\n\r\n"
"""Of an event and the chunk that it is in."""


class Relay:
    """Passes on what is sent to a server, and what comes back."""

    def __init__(self, url: str, after: int = 900):
        """Lead to the server at `url`; of an answer `after` bytes get through before its fault."""
        self._to, self._after = urlsplit(url), after
        self.fault: Fault = ""
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Break all off; nobody is led anywhere any more."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.read(65536)
        fault: Fault = "" if head.startswith(b"GET ") else self.fault
        there, back = await asyncio.open_connection(self._to.hostname, self._to.port)
        back.write(head)
        up = asyncio.ensure_future(self._pass_on(reader, back))
        try:
            await self._answer(there, writer, fault)
        finally:
            up.cancel()
            back.close()
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
        got = b""
        while data := await there.read(65536):
            if not fault:
                writer.write(data)
                continue
            got += data
            if len(got) >= self._after:
                break
        if not fault:
            return
        if fault == "silent":
            await asyncio.sleep(3600)
        writer.write(got[: got.rfind(_EVENT_END, 0, self._after) + len(_EVENT_END)])
        if fault == "stall":
            await asyncio.sleep(3600)
        elif fault == "cut":
            await writer.drain()
            writer.transport.abort()
        elif fault == "end":  # by what HTTP says it is whole
            writer.write(b"0\r\n\r\n")
        else:
            writer.write(b"14\r\ndata: no json here\n\n\r\n0\r\n\r\n")
