"""The server described in OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from moeshard.serving.fields import MAX_INT
from moeshard.serving.protocol import MAX_PROMPTS, MAX_STOPS, MAX_TOP_LOGPROBS, MIN_PENALTY, ROLES
from moeshard.serving.schema_union import TYPES

_TEXT = {"type": "string"}
_BOOL = {"type": ["boolean", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class Described(Protocol):
    """What of an endpoint is told."""

    @property
    def path(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def public(self) -> bool: ...


def describe(
    models: Sequence[str], n_vocab: int | None, endpoints: Sequence[Described], has_keys: bool
) -> dict[str, Any]:
    """Return the OpenAPI document of a server that serves these models and endpoints.

    `n_vocab` is the number of tokens, None where that is not known.
    """
    token = {"type": "integer", "minimum": 0, "maximum": MAX_INT if n_vocab is None else n_vocab - 1}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path", "")
        operation = _operation(path, models, token)
        if has_keys and not endpoint.public:
            operation["security"] = [{"bearer": []}, {"header": []}]
            operation["responses"]["401"] = _failure("No API key, or an unknown one.")
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "moeshard", "version": "1", "description": "OpenAI-compatible; see docs/serving.md."},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}, **({"securitySchemes": schemes} if has_keys else {})},
    }


def _operation(path: str, models: Sequence[str], token: dict[str, Any]) -> dict[str, Any]:
    if path == "/v1/chat/completions":
        return _post("Answer a chat.", _chat_body(models), _completion("message"), stream=True)
    if path == "/v1/completions":
        return _post("Continue a text.", _completion_body(models, token), _completion("text"), stream=True)
    if path == "/v1/embeddings":
        return {
            "summary": "There are none.",
            "requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}},
            "responses": {"413": _failure("Too large."), "501": _failure("Not supported.")},
        }
    if path == "/tokenize":
        body = _object({"content": _TEXT, "add_special": _BOOL, "parse_special": _BOOL}, "content")
        return _post("Make tokens of a text.", body, _object({"tokens": _array({"type": "integer"})}, "tokens"))
    if path == "/detokenize":
        body = _object({"tokens": _array(token)}, "tokens")
        return _post("Make text of tokens.", body, _object({"content": _TEXT}, "content"))
    if path == "/moeshard/losses":
        return _losses(token)
    if path == "/moeshard/render":
        told = _object({"tokens": _array({"type": "integer"}), "stop": _array(_TEXT)}, "tokens", "stop")
        return _post("Make tokens of a prompt, as the model reads it.", _turn(token), told)
    if path == "/v1/models/{name}":
        operation = _get("One of the models.", _model())
        operation["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": list(models)}}
        ]
        operation["responses"]["404"] = _failure("No such model.")
        return operation
    if path == "/health":
        operation = _get("Whether requests can be answered.", _object({"status": _TEXT}, "status"))
        operation["responses"]["503"] = _failure("They cannot.")
        return operation
    if path in ("/metrics", "/"):
        media = "text/html" if path == "/" else "text/plain"
        what = "A page to chat with." if path == "/" else "Figures for Prometheus."
        return {"summary": what, "responses": {"200": {"description": what, "content": {media: {"schema": _TEXT}}}}}
    return _get(*_PLAIN[path])


def _get(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _success(summary, schema)}}


def _post(summary: str, body: dict[str, Any], schema: dict[str, Any], stream: bool = False) -> dict[str, Any]:
    success = _success(summary, schema)
    responses: dict[str, Any] = {
        "200": success,
        "400": _failure("The request is wrong."),
        "413": _failure("It is too large."),
        "415": _failure("It is no JSON."),
        "500": _failure("The engine failed."),
    }
    if stream:
        success["content"]["text/event-stream"] = {"schema": _object({"data": _TEXT}, "data")}
        success["headers"] = {
            "x-moeshard-node": {"description": "Who answers.", "schema": _TEXT},
            "x-moeshard-reason": {"description": "Why.", "schema": _TEXT},
            "x-moeshard-fit": {"description": "Its quality on the first turn, 0 to 1.", "schema": {"type": "number"}},
        }
        responses["404"] = _failure("No such model.")
        responses.update(_BUSY)
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": responses,
    }


def _turn(token: dict[str, Any]) -> dict[str, Any]:
    prompt = {"anyOf": [_TEXT, _array(token, minItems=1)]}
    return {"anyOf": [_object({"messages": _messages()}, "messages"), _object({"prompt": prompt}, "prompt")]}


def _losses(token: dict[str, Any]) -> dict[str, Any]:
    numbers = _array({"type": "number"})
    told = {"nodes": _array(numbers), "full": numbers, "n_tokens": {"type": "integer"}, "n_cut": {"type": "integer"}}
    operation = _post("What a first turn costs nodes and model, nats per token.", _turn(token), _object(told, *told))
    operation["responses"].update(_BUSY)
    return operation


def _success(what: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": what, "content": {"application/json": {"schema": schema}}}


def _failure(what: str) -> dict[str, Any]:
    return {"description": what, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _array(items: dict[str, Any], **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


def _number(low: float, high: float, kind: str = "number") -> dict[str, Any]:
    return {"type": [kind, "null"], "minimum": low, "maximum": high}


def _model() -> dict[str, Any]:
    return _object(
        {"id": _TEXT, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": _TEXT},
        "id", "object", "created", "owned_by",
    )  # fmt: skip


def _options(models: Sequence[str]) -> dict[str, Any]:
    schema = _object({"type": {"enum": list(TYPES)}})  # of all that JSON schema has
    named = _object({"name": _TEXT, "schema": schema, "strict": _BOOL}, "schema")
    form = {
        "anyOf": [
            _object({"type": {"enum": ["text", "json_object"]}}, "type"),
            _object({"type": {"const": "json_schema"}, "json_schema": named}, "type", "json_schema"),
            {"type": "null"},
        ]
    }
    stop = {
        "anyOf": [_TEXT, _array(_TEXT, maxItems=MAX_STOPS), {"type": "null"}],
        "description": "Texts that end the answer.",
    }
    biases = {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": _number(-100, 100),
    }
    return {
        "model": {"enum": [*models, None]},
        "max_tokens": _number(-1, MAX_INT, "integer"),
        "temperature": _number(0, 100),
        "top_p": _number(0, 1),
        "top_k": _number(0, MAX_INT, "integer"),
        "min_p": _number(0, 1),
        "repeat_penalty": _number(MIN_PENALTY, 100),
        "repeat_last_n": _number(0, MAX_INT, "integer"),
        "frequency_penalty": _number(-2, 2),
        "presence_penalty": _number(-2, 2),
        "logit_bias": biases,
        "seed": _number(-(2**63), 2**63 - 1, "integer"),
        "stop": stop,
        "stream": _BOOL,
        "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _BOOL}},
        "n": {"enum": [1, None]},
        "response_format": form,
        "prompt_cache_key": {"type": ["string", "null"]},
        "begun": {"type": ["string", "null"]},
        "ignore_eos": _BOOL,
    }


def _messages() -> dict[str, Any]:
    part = _object({"type": {"const": "text"}, "text": _TEXT}, "type", "text")
    message = _object({"role": {"enum": list(ROLES)}, "content": {"anyOf": [_TEXT, _array(part)]}}, "role", "content")
    return _array(message, minItems=1)


def _chat_body(models: Sequence[str]) -> dict[str, Any]:
    own = {
        "messages": _messages(),
        "max_completion_tokens": _number(-1, MAX_INT, "integer"),
        "logprobs": _BOOL,
        "top_logprobs": _number(0, MAX_TOP_LOGPROBS, "integer"),
    }
    return _object({**_options(models), **own}, "messages")


def _completion_body(models: Sequence[str], token: dict[str, Any]) -> dict[str, Any]:
    ids = _array(token, minItems=1)
    many = {"minItems": 1, "maxItems": MAX_PROMPTS}
    text = {"type": "string", "minLength": 1}
    prompt = {"anyOf": [text, _array(text, **many), ids, _array(ids, **many)]}
    own = {"prompt": prompt, "echo": _BOOL, "logprobs": _number(0, MAX_TOP_LOGPROBS, "integer")}
    return _object({**_options(models), **own}, "prompt")


def _completion(part: str) -> dict[str, Any]:
    content: dict[str, Any] = _TEXT if part == "text" else _object({"role": _TEXT, "content": _TEXT}, "role", "content")
    choice = _object(
        {
            "index": {"type": "integer"},
            part: content,
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": {"enum": ["stop", "length"]},
        },
        "index", part, "logprobs", "finish_reason",
    )  # fmt: skip
    usage = _object(
        {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
        "prompt_tokens", "completion_tokens", "total_tokens",
    )  # fmt: skip
    return _object(
        {
            "id": _TEXT,
            "object": _TEXT,
            "created": {"type": "integer"},
            "model": _TEXT,
            "choices": _array(choice),
            "usage": usage,
        },
        "id", "object", "created", "model", "choices", "usage",
    )  # fmt: skip


_BUSY = {
    "429": _failure("Too many requests are waiting."),
    "503": _failure("Nobody can answer."),
    "504": _failure("It took too long."),
}

_PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/models": ("What can be asked for.", _object({"object": _TEXT, "data": _array(_model())}, "object", "data")),
    "/nodes": ("Who answers, and what each has to do.", _object({"data": _array({"type": "object"})}, "data")),
    "/props": ("Slots and context.", _object({"model_alias": _TEXT, "total_slots": {"type": "integer"}})),
    "/live": ("Whether the process runs.", _object({"status": _TEXT}, "status")),
    "/openapi.json": ("This document.", {"type": "object"}),
}
