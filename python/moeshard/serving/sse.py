"""Reading server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from moeshard.serving.node_errors import NodeError


async def chunks(pieces: AsyncIterator[bytes]) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the JSON objects of a stream, up to its end or ``[DONE]``; comments are left out.

    Raises:
        NodeError: something in it is no JSON object.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            name, _, data = line.rstrip(b"\r").partition(b":")
            if name not in (b"data", b"error"):
                continue
            data = data.strip()
            if data == b"[DONE]":
                return
            try:
                found = json.loads(data)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise NodeError("answer", "a node streams what is no JSON", 502)
            yield {"error": found} if name == b"error" and "error" not in found else found
