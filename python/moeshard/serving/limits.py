"""What stands before the application: how large requests may be, and by which names the server may be called."""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeshard.serving.errors import ApiError, too_large
from moeshard.serving.stream import encode

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}", re.ASCII)


class RequestId:
    """Gives each request an id, its own where it brings one, and the answer the same."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        known = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = known

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = known
            await send(message)

        await self._app(scope, receive, send_with_id)


class Hosts:
    """Refuses requests that call the server by a name that is not its own.

    A page in a browser can make its own name mean this machine (DNS rebinding) and would then read the answers of a
    server that only listens here. An address in numbers is no name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None):
        """`hosts` are the names beside addresses in numbers, without port; None: any."""
        self._app, self._hosts = app, None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._hosts is not None:
            host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).lower()
            if host not in self._hosts and not _is_address(host):
                message = f"The host '{host[:200]}' is not known here; allow it with --allow-host, or set API keys."
                await refuse(ApiError(403, message, code="unknown_host"), send)
                return
        await self._app(scope, receive, send)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


class BodyLimit:
    """Refuses requests that are larger than is good for anybody, as soon as that is known."""

    def __init__(self, app: ASGIApp, n_bytes: int):
        self._app, self._n_bytes = app, n_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "")
        if told.isdigit() and int(told) > self._n_bytes:
            await refuse(too_large(self._n_bytes), send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._n_bytes:
                raise too_large(self._n_bytes)
            return message

        await self._app(scope, limited, send)


async def refuse(error: ApiError, send: Send) -> None:
    """Send an error as the whole answer."""
    headers = {"content-type": "application/json", "connection": "close", **error.headers}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": encode(error.to_json())})
