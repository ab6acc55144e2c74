"""What can be wrong with a node, as errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from moeshard.serving.errors import INVALID, ApiError, busy, unsupported

Cause = Literal["connect", "cut", "timeout", "health", "status", "answer", "key"]
"""Why a node did not answer: it cannot be reached; the line broke; it was silent too long; its health was lost
meanwhile; it said that it failed; what it said made no sense; it does not take the gateway's API key."""


class NodeError(ApiError):
    """A node failed, not the request: another may answer it."""

    def __init__(self, cause: Cause, message: str, status: int = 503):
        code = "timeout" if cause == "timeout" else "node_failed"
        super().__init__(status, message, kind="server_error", code=code, headers={"Retry-After": "5"})
        self.cause: Cause = cause


def told(name: str, status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> ApiError:
    """Return what a node's answer with an error means.

    Args:
        name: of the node.
        status: of its answer; of an error within a stream, what it would have been.
        body: the answer's JSON.
        headers: names in lower case.
    """
    error = body.get("error")
    error = error if isinstance(error, dict) else {}
    message, code, param = f"{error.get('message') or 'no reason given'}", error.get("code"), error.get("param")
    if status in (401, 403):
        return NodeError("key", f"{name} does not take the gateway's API key, or its name for it: {message}")
    if status == 429:
        wait = headers.get("retry-after", "")
        return busy(int(wait) if wait.isdigit() else 1)
    if status == 501:
        return unsupported(message, param if isinstance(param, str) else None)
    if error.get("type") == "exceed_context_size_error":
        code = "context_length_exceeded"
    if status in (400, 413, 415, 422):
        return ApiError(
            status,
            message,
            kind=INVALID,
            param=param if isinstance(param, str) else None,
            code=code if isinstance(code, str) else None,
        )
    if status == 504 or code == "timeout":
        return NodeError("timeout", f"{name}: {message}", 504)
    return NodeError("status", f"{name} failed ({status}): {message}", status if status in (500, 502, 503) else 502)
