"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVALID = "invalid_request_error"


class ApiError(Exception):
    """What a client is told: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def is_ours(self) -> bool:
        """Whether the server failed, not the request: another backend might answer it."""
        return self.status >= 500


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong."""
    return ApiError(400, message, param=param, code=code)


def too_long(n_prompt: int, n_ctx: int) -> ApiError:
    """The prompt does not fit."""
    return invalid(
        f"This model's maximum context length is {n_ctx} tokens, and the prompt has {n_prompt}. Shorten it, or start "
        f"the server with a larger --ctx.",
        code="context_length_exceeded",
    )


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def unknown_model(name: str, served: str) -> ApiError:
    return ApiError(
        404,
        f"The model '{name}' does not exist here; GET /v1/models lists what does, '{served}' among them.",
        param="model",
        code="model_not_found",
    )


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request is larger than the {limit} bytes that are taken here.", code="request_too_large")


def busy(seconds: int) -> ApiError:
    """The queue is full."""
    return ApiError(
        429,
        "Too many requests are waiting; try again later.",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def failed(message: str) -> ApiError:
    """The engine failed while it answered."""
    return ApiError(500, message, kind="server_error", code="engine_failed")


def unavailable(message: str, code: str = "unavailable") -> ApiError:
    return ApiError(503, message, kind="unavailable_error", code=code, headers={"Retry-After": "5"})


def timed_out(seconds: float) -> ApiError:
    """The answer took too long."""
    return ApiError(504, f"The answer was not done within {seconds:g} seconds.", kind="server_error", code="timeout")


def unsupported(message: str, param: str | None = None) -> ApiError:
    """There is such a thing, but not here."""
    return ApiError(501, message, kind="not_supported_error", param=param, code="not_supported")
