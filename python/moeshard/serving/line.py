"""The line to another server: HTTP, and what its failures mean."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from moeshard.serving.auth import SCOPE_HEADER
from moeshard.serving.node_errors import NodeError, told
from moeshard.serving.sse import chunks


@dataclass(frozen=True)
class Said:
    """What came back, whole."""

    status: int
    body: dict[str, Any]
    """Its JSON object; empty where it was none."""
    headers: Mapping[str, str]

    def error(self, name: str) -> Exception:
        """Return what it means, said by `name` of an error."""
        return told(name, self.status, self.body, self.headers)


class Line:
    """To one server, from one event loop. No deadlines but that for connecting."""

    def __init__(self, name: str, url: str, key: str, connect_seconds: float):
        """Lead to the server `name` at `url`, which wants this API key, if any."""
        self._name = name
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        # Each request has a connection of its own: one that the other end is just closing would look like a failure.
        # Nodes are not reached through the proxy that the environment may name.
        self._client = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(None, connect=connect_seconds),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            verify=ssl.create_default_context() if url.startswith("https:") else False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Give all connections back."""
        await self._client.aclose()

    async def get(self, path: str) -> Said:
        """Ask for something.

        Raises:
            NodeError: no answer came.
        """
        try:
            return _said(await self._client.get(path, headers=self._headers))
        except httpx.HTTPError as error:
            raise self._broken(error) from error

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send JSON and return the JSON that comes back.

        Raises:
            ApiError: it is an error, or no answer came.
        """
        try:
            found = _said(await self._client.post(path, json=body, headers=self._headers))
        except httpx.HTTPError as error:
            raise self._broken(error) from error
        if found.status != 200:
            raise found.error(self._name)
        return found.body

    async def chunks(self, path: str, body: Mapping[str, Any], scope: str) -> AsyncGenerator[dict[str, Any], None]:
        """Send JSON and yield the objects of the stream that comes back.

        What the server remembers of it serves requests of the same `scope` only.

        Raises:
            ApiError: it is an error, or the line broke.
        """
        headers = {**self._headers, **({SCOPE_HEADER: scope} if scope else {})}
        try:
            async with self._client.stream("POST", path, json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise _said(answer).error(self._name)
                async for chunk in chunks(answer.aiter_bytes()):
                    yield chunk
        except httpx.HTTPError as error:
            raise self._broken(error) from error

    def _broken(self, error: httpx.HTTPError) -> NodeError:
        why = str(error) or type(error).__name__
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return NodeError("connect", f"{self._name} cannot be reached: {why}")
        return NodeError("cut", f"{self._name} broke off: {why}", 502)


def _said(answer: httpx.Response) -> Said:
    try:
        found = json.loads(answer.content)
    except ValueError:
        found = {}
    return Said(answer.status_code, found if isinstance(found, dict) else {}, answer.headers)
