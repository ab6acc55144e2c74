"""The ASGI application: routes, and what stands before and behind them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from moeshard.runtime.model import Model
from moeshard.serving.auth import Keys, scope_of
from moeshard.serving.backends import Backend
from moeshard.serving.errors import ApiError, failed
from moeshard.serving.inner import Inner
from moeshard.serving.limits import BodyLimit, Hosts, RequestId
from moeshard.serving.placer import Placer
from moeshard.serving.routes import Api, Endpoint, Json
from moeshard.serving.service import Client, Service
from moeshard.serving.settings import Settings
from moeshard.serving.stream import ClientGone

_log = logging.getLogger("moeshard.serving")

_CODES = {404: "not_found", 405: "method_not_allowed"}


def build(
    model: str,
    placer: Placer,
    backends: Sequence[Backend],
    settings: Settings,
    tokenizer: Model | None = None,
    inner: Inner | None = None,
) -> Starlette:
    """Make the application.

    Args:
        model: the name that it is served by.
        placer: chooses one of the backends for each session.
        backends: who answers: nodes of a plan, and the whole model as `moeshard.serving.backends.FULL`. They are
            started and stopped with the application.
        settings: who may ask, and how much.
        tokenizer: for /tokenize and /detokenize; None: these are not there.
        inner: what gateways ask for; None: that is not there.
    """
    service = Service(model, placer, backends, settings.resume)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    async def on_error(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        service.metrics.failed(error.status)
        if error.is_ours:
            _log.warning("%s %s: %s", http.method, http.url.path, error.message)
        return Json(error.to_json(), error.status, error.headers)

    endpoints = Api(service, settings, tokenizer, inner).endpoints()
    return Starlette(
        routes=[
            Route(endpoint.path, _guarded(endpoint, settings.keys), methods=[endpoint.method]) for endpoint in endpoints
        ],
        middleware=[
            Middleware(RequestId),
            Middleware(Hosts, settings.hosts),
            Middleware(BodyLimit, settings.max_body),
        ],
        exception_handlers={ApiError: on_error, HTTPException: _on_http, ClientGone: _on_gone},
        lifespan=lifespan,
    )


def _guarded(endpoint: Endpoint, keys: Keys) -> Callable[[HttpRequest], Awaitable[ASGIApp]]:
    """Return the endpoint's handler, which asks for a key first and fails as OpenAI does."""

    async def call(http: HttpRequest) -> ASGIApp:
        try:
            headers = dict(http.headers)
            client = Client("" if endpoint.public else scope_of(keys, headers), headers)
            return await endpoint.handler(http, client)
        except (ApiError, HTTPException, ClientGone):
            raise
        except Exception as error:
            _log.exception("%s %s failed", http.method, http.url.path)
            raise failed("The server failed; its log says why.") from error

    return call


async def _on_http(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}."
    told = ApiError(error.status_code, message, code=_CODES.get(error.status_code))
    return Json(told.to_json(), error.status_code, error.headers)


async def _on_gone(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
