"""What each route does."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp

from moeshard._core import MoeshardError
from moeshard.runtime.model import Model
from moeshard.serving.decision import Decision
from moeshard.serving.errors import ApiError, invalid, unavailable, unknown_model, unsupported
from moeshard.serving.failover import Course
from moeshard.serving.fields import MAX_INT, Fields, parse_object
from moeshard.serving.inner import Inner
from moeshard.serving.losses import losses_to_json
from moeshard.serving.metrics import MEDIA_TYPE
from moeshard.serving.openapi import describe
from moeshard.serving.protocol import Request, chat_request, completion_request, turn_request
from moeshard.serving.rendering import rendered
from moeshard.serving.replies import Replies
from moeshard.serving.service import Client, Service
from moeshard.serving.settings import Settings
from moeshard.serving.stream import EventStream, encode, until_disconnect

Handler: TypeAlias = "Callable[[HttpRequest, Client], Awaitable[ASGIApp]]"


@dataclass(frozen=True)
class Endpoint:
    """A route: where, by which method, by whom, and what it does."""

    path: str
    method: str
    handler: Handler
    public: bool = False
    """Whether no API key is asked for."""


class Json(Response):
    """An answer in JSON, compact and in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


class Api:
    """The handlers, and the table of where they are."""

    def __init__(
        self,
        service: Service,
        settings: Settings,
        tokenizer: Model | None,
        inner: Inner | None,
    ):
        self._service, self._settings, self._tokenizer = service, settings, tokenizer
        self._inner = inner
        self._created = int(time.time())
        self._page = Path(__file__).with_name("page.html").read_bytes() if settings.page else b""

    def endpoints(self) -> list[Endpoint]:
        """Return what there is under these settings."""
        found = [
            Endpoint("/v1/models", "GET", self._models),
            Endpoint("/v1/models/{name:path}", "GET", self._model),
            Endpoint("/v1/chat/completions", "POST", self._chat),
            Endpoint("/v1/completions", "POST", self._complete),
            Endpoint("/v1/embeddings", "POST", self._embed),
            Endpoint("/nodes", "GET", self._nodes),
            Endpoint("/props", "GET", self._props),
            Endpoint("/health", "GET", self._health, public=True),
            Endpoint("/live", "GET", self._live, public=True),
            Endpoint("/openapi.json", "GET", self._openapi, public=True),
        ]
        if self._tokenizer is not None:
            found.append(Endpoint("/tokenize", "POST", self._tokenize))
            found.append(Endpoint("/detokenize", "POST", self._detokenize))
        if self._inner is not None:
            found.append(Endpoint("/moeshard/losses", "POST", self._losses))
            found.append(Endpoint("/moeshard/render", "POST", self._render))
        if self._settings.metrics != "off":
            found.append(Endpoint("/metrics", "GET", self._metrics, public=self._settings.metrics == "public"))
        if self._settings.page:
            found.append(Endpoint("/", "GET", self._show_page, public=True))
        return found

    # Text.

    async def _chat(self, http: HttpRequest, client: Client) -> ASGIApp:
        return await self._answer(http, client, chat_request(await _body(http)))

    async def _complete(self, http: HttpRequest, client: Client) -> ASGIApp:
        return await self._answer(http, client, completion_request(await _body(http)))

    async def _answer(self, http: HttpRequest, client: Client, request: Request) -> ASGIApp:
        course = await until_disconnect(http.receive, self._service.place(request, client))
        replies = Replies(request, request.model or self._service.model, course)
        if request.stream:
            chunks = self._chunks(request, course, client, replies)
            return EventStream(
                chunks,
                lambda: _placement_headers(course.decision),
                self._settings.ping_seconds,
                self._service.metrics.failed,
            )
        whole = await until_disconnect(http.receive, self._whole(request, course, client, replies))
        return Json(whole, headers=_placement_headers(course.decision))

    async def _whole(self, request: Request, course: Course, client: Client, replies: Replies) -> dict[str, Any]:
        async with aclosing(self._service.answers(request, course, client)) as events:
            async for index, event in events:
                replies.add(index, event)
        return replies.whole()

    async def _chunks(
        self, request: Request, course: Course, client: Client, replies: Replies
    ) -> AsyncGenerator[dict[str, Any], None]:
        opened = False
        async with aclosing(self._service.answers(request, course, client)) as events:
            async for index, event in events:
                if not opened:  # not before something came: what fails before has a status of its own
                    opened = True
                    for chunk in replies.opening():
                        yield chunk
                for chunk in replies.chunks(index, event):
                    yield chunk
        for chunk in replies.closing():
            yield chunk

    async def _embed(self, http: HttpRequest, client: Client) -> ASGIApp:
        raise unsupported("There are no embeddings here: this server writes text.")

    async def _tokenize(self, http: HttpRequest, client: Client) -> ASGIApp:
        fields = Fields(await _body(http))
        text = fields.needed_text("content")
        special, parse = fields.flag("add_special"), fields.flag("parse_special", True)
        assert self._tokenizer is not None
        tokens = await asyncio.to_thread(self._tokenizer.tokenize, text, special=special, parse=parse)
        return Json({"tokens": tokens.tolist()})

    async def _detokenize(self, http: HttpRequest, client: Client) -> ASGIApp:
        fields = Fields(await _body(http))
        tokens = [fields.check_integer(token, "tokens", 0, MAX_INT) for token in fields.array("tokens")]
        assert self._tokenizer is not None
        try:
            return Json({"content": await asyncio.to_thread(self._tokenizer.detokenize, tokens, special=True)})
        except MoeshardError as error:
            raise invalid(str(error), "tokens") from error

    async def _losses(self, http: HttpRequest, client: Client) -> ASGIApp:
        prompt = turn_request(await _body(http))
        assert self._inner is not None
        return Json(losses_to_json(await until_disconnect(http.receive, self._inner.prober.losses(prompt))))

    async def _render(self, http: HttpRequest, client: Client) -> ASGIApp:
        prompt = turn_request(await _body(http))
        assert self._inner is not None
        found = await rendered(self._inner.renderer, prompt)
        return Json({"tokens": found.tokens.tolist(), "stop": list(found.stop)})

    # About the server.

    async def _models(self, http: HttpRequest, client: Client) -> ASGIApp:
        return Json({"object": "list", "data": [self._describe(name) for name in self._service.models()]})

    async def _model(self, http: HttpRequest, client: Client) -> ASGIApp:
        name = http.path_params["name"]
        if name not in self._service.models():
            raise unknown_model(name, self._service.model)
        return Json(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "moeshard"}

    async def _nodes(self, http: HttpRequest, client: Client) -> ASGIApp:
        return Json({"object": "list", "model": self._service.model, "data": self._service.nodes()})

    async def _props(self, http: HttpRequest, client: Client) -> ASGIApp:
        backends = self._service.backends.values()
        return Json(
            {
                "model_alias": self._service.model,
                "total_slots": max(backend.load.slots for backend in backends),
                "default_generation_settings": {"n_ctx": min((one.n_ctx for one in backends if one.n_ctx), default=0)},
                **({"moeshard": self._inner.about} if self._inner is not None else {}),
            }
        )

    async def _health(self, http: HttpRequest, client: Client) -> ASGIApp:
        fault = self._service.fault
        if fault is not None:
            raise unavailable(fault)
        down = [name for name, backend in self._service.backends.items() if backend.fault is not None]
        return Json({"status": "degraded", "down": down} if down else {"status": "ok"})

    async def _live(self, http: HttpRequest, client: Client) -> ASGIApp:
        return Json({"status": "ok"})

    async def _metrics(self, http: HttpRequest, client: Client) -> ASGIApp:
        return Response(self._service.metrics.text(), headers={"content-type": MEDIA_TYPE})

    async def _openapi(self, http: HttpRequest, client: Client) -> ASGIApp:
        n_vocab = None if self._tokenizer is None else self._tokenizer.n_vocab
        return Json(describe(self._service.models(), n_vocab, self.endpoints(), bool(self._settings.keys)))

    async def _show_page(self, http: HttpRequest, client: Client) -> ASGIApp:
        return Response(self._page, media_type="text/html", headers=page_headers(self._page))


async def _body(http: HttpRequest) -> dict[str, Any]:
    """Return the JSON object that was sent.

    A page in a browser can send JSON to another server only if that allows it, but text to any: so only what says that
    it is JSON is taken.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "The body must be JSON, with Content-Type: application/json.", code="unsupported_media_type"
        )
    return parse_object(await http.body())


def _placement_headers(decision: Decision) -> Mapping[str, str]:
    headers = {"x-moeshard-node": decision.backend, "x-moeshard-reason": decision.reason}
    if decision.fit is not None:
        headers["x-moeshard-fit"] = f"{decision.fit:.4f}"
    return headers


def page_headers(page: bytes) -> Mapping[str, str]:
    """Return headers under which a browser runs what the page holds, and nothing that a model may write into it."""
    policy = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in found]
        policy.append(f"{tag}-src {' '.join(hashes)}")
    return {
        "content-security-policy": "; ".join([*policy, "frame-ancestors 'none'"]),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }
