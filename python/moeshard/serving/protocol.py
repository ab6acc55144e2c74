"""OpenAI's requests: JSON in, checked dataclasses out. Nothing here knows a model.

What is taken, ignored and refused is told in docs/serving.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from moeshard._core import MoeshardError
from moeshard.serving.errors import invalid
from moeshard.serving.fields import MAX_INT, Fields
from moeshard.serving.schema import schema_grammar

MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 256
MIN_PENALTY = 0.01
LEAST_TOP_P = 1e-6
"""What the engine is told for 0: the likeliest token alone."""
ROLES = ("system", "developer", "user", "assistant", "tool")

_log = logging.getLogger("moeshard.serving")
_told: set[str] = set()

# Fields that change nothing about an answer.
_HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "verbosity")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


Prompt: TypeAlias = "tuple[Message, ...] | str | tuple[int, ...]"
"""What an answer follows: a chat, a text, or token ids."""


@dataclass(frozen=True)
class Options:
    """How an answer is written. Defaults are those of `moeshard.Model.generate`."""

    max_tokens: int = -1
    """Negative: until the context is full."""
    stop: tuple[str, ...] = ()
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""
    seed: int | None = None
    ignore_end: bool = False
    n_logprobs: int = -1
    """Likeliest tokens told beside each; -1: no log-probabilities."""
    echo: bool = False
    """The prompt comes first, as text, with log-probabilities where these are told."""


@dataclass(frozen=True)
class Request:
    """A request for text."""

    prompts: tuple[Prompt, ...]
    """One for a chat."""
    options: Options
    model: str | None
    is_chat: bool
    stream: bool = False
    include_usage: bool = False
    prompt_cache_key: str | None = None
    begun: str = ""
    """What of the answer is there already."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """Names of fields that nobody looked at."""


def chat_request(body: Mapping[str, Any]) -> Request:
    """Read a request to /v1/chat/completions.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    messages = tuple(_message(value, index) for index, value in enumerate(fields.array("messages")))
    if not messages:
        raise invalid("messages must not be empty.", "messages")
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
    limit = fields.integer("max_tokens", -1, -1)
    limit = fields.integer("max_completion_tokens", limit, -1)
    for name in ("tools", "functions"):
        fields.refuse(name, "tools are not supported: answers here are text.", [])
    fields.refuse("tool_choice", "tools are not supported: answers here are text.", "none", "auto")
    fields.refuse("function_call", "tools are not supported: answers here are text.", "none", "auto")
    fields.refuse("modalities", "answers here are text.", ["text"])
    fields.refuse("audio", "answers here are text.")
    fields.refuse("web_search_options", "there is no web search here.")
    fields.raw("reasoning_effort")
    return _request(fields, (messages,), limit, n_logprobs=top if wanted else -1, is_chat=True)


def completion_request(body: Mapping[str, Any]) -> Request:
    """Read a request to /v1/completions.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    prompts = _prompts(fields)
    n_logprobs = fields.integer("logprobs", -1, 0, MAX_TOP_LOGPROBS)
    fields.refuse("suffix", "text is only continued, not filled in.", "")
    fields.refuse("best_of", "one answer is written for each prompt.", 1)
    echo = fields.flag("echo")
    return _request(fields, prompts, fields.integer("max_tokens", 16, -1), n_logprobs=n_logprobs, echo=echo)


def turn_request(body: Mapping[str, Any]) -> Prompt:
    """Read a first turn that is to be measured: ``messages``, or a ``prompt``.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    if fields.given("messages"):
        return tuple(_message(value, index) for index, value in enumerate(fields.array("messages")))
    value = fields.raw("prompt")
    return value if isinstance(value, str) else _ids(fields, value)


def prompt_json(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as a request has it; `turn_request` reads it."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if prompt and isinstance(prompt[0], Message):
        return {"messages": [asdict(message) for message in prompt if isinstance(message, Message)]}
    return {"prompt": list(prompt)}


def _request(
    fields: Fields,
    prompts: tuple[Prompt, ...],
    max_tokens: int,
    *,
    n_logprobs: int,
    is_chat: bool = False,
    echo: bool = False,
) -> Request:
    fields.refuse("n", "one answer is written for each prompt; ask again for another.", 1)
    stream = fields.flag("stream")
    stream_options = fields.inner("stream_options")
    usage = stream_options is not None and stream_options.flag("include_usage")
    for name in _HARMLESS:
        fields.raw(name)
    request = Request(
        prompts=prompts,
        options=Options(
            max_tokens=max_tokens,
            stop=_stops(fields),
            temperature=fields.number("temperature", Options.temperature, 0, 100),
            top_k=fields.integer("top_k", Options.top_k),
            top_p=max(fields.number("top_p", Options.top_p, 0, 1), LEAST_TOP_P),
            min_p=fields.number("min_p", Options.min_p, 0, 1),
            repeat_penalty=fields.number("repeat_penalty", Options.repeat_penalty, MIN_PENALTY, 100),
            repeat_last_n=fields.integer("repeat_last_n", Options.repeat_last_n),
            frequency_penalty=fields.number("frequency_penalty", 0, -2, 2),
            presence_penalty=fields.number("presence_penalty", 0, -2, 2),
            logit_bias=_biases(fields),
            grammar=_grammar(fields),
            seed=_seed(fields),
            ignore_end=fields.flag("ignore_eos"),
            n_logprobs=n_logprobs,
            echo=echo,
        ),
        model=fields.text("model"),
        is_chat=is_chat,
        stream=stream,
        include_usage=stream and usage,
        prompt_cache_key=fields.text("prompt_cache_key"),
        begun=fields.text("begun") or "",
        ignored=tuple(fields.left()),
    )
    for name in request.ignored:
        _tell_once(name)
    return request


def _tell_once(name: str) -> None:
    if name not in _told and len(_told) < 1000:  # names come from outside
        _told.add(name)
        _log.warning("ignored the unknown field %.100r of a request", name)


def _message(value: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise invalid(f"{where} must be an object.", where)
    fields = Fields(value, where)
    role = fields.needed_text("role")
    if role not in ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(ROLES)}.", f"{where}.role")
    content = fields.raw("content")
    if content is None and role == "assistant":
        content = ""  # it called a tool
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{at}]") for at, part in enumerate(content))
    if not isinstance(content, str):
        raise invalid(f"{where}.content must be a string or an array of text parts.", f"{where}.content")
    return Message("system" if role == "developer" else role, content)


def _part(value: Any, where: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "refusal"):
        raise invalid(f"{where}: only parts of type text are supported here.", where, "unsupported_content")
    text = value.get(kind)
    if not isinstance(text, str):
        raise invalid(f"{where}.{kind} must be a string.", where)
    return text


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    value = fields.raw("prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise invalid("prompt must be a string, strings, token ids, or arrays of token ids.", "prompt")
    if isinstance(value[0], (int, float)):
        return (_ids(fields, value),)
    if len(value) > MAX_PROMPTS:
        raise invalid(f"prompt: at most {MAX_PROMPTS} at once.", "prompt")
    return tuple(item if isinstance(item, str) else _ids(fields, item) for item in value)


def _ids(fields: Fields, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise invalid("prompt must be a string, strings, token ids, or arrays of token ids.", "prompt")
    return tuple(fields.check_integer(item, "prompt", 0, MAX_INT) for item in value)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    if value is None:
        return ()
    stops: Sequence[Any] = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop must be a string or an array of strings.", "stop")
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop: at most {MAX_STOPS} texts.", "stop")
    return tuple(stop for stop in stops if stop)


def _seed(fields: Fields) -> int | None:
    value = fields.raw("seed")
    if value is None or value == -1:  # llama.cpp's clients write -1 for "any"
        return None
    seed = fields.check_integer(value, "seed", -(2**63), 2**63 - 1)
    return seed % (2**32 - 1)  # the engine's seeds; those that it has stay themselves


def _biases(fields: Fields) -> tuple[tuple[int, float], ...]:
    inner = fields.inner("logit_bias")
    if inner is None:
        return ()
    biases = []
    for name in inner.left():
        if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) <= MAX_INT):
            raise invalid(f"logit_bias: '{name[:100]}' is no token id.", "logit_bias")
        biases.append((int(name), inner.number(name, 0, -100, 100)))
    return tuple(biases)


def _grammar(fields: Fields) -> str:
    grammar = fields.text("grammar") or ""
    form = fields.inner("response_format")
    kind = form.needed_text("type") if form is not None else "text"
    if form is None or kind == "text":
        return grammar
    if grammar:
        raise invalid("grammar and response_format contradict each other; give one of them.", "grammar")
    if kind not in ("json_object", "json_schema"):
        raise invalid(
            "response_format.type must be text, json_object or json_schema.", "response_format.type", "invalid_value"
        )
    schema: Any = {"type": "object"}
    if kind == "json_object":
        schema = form.raw("schema") or schema  # llama-server's way
    else:
        described = form.inner("json_schema")
        schema = described.raw("schema") if described is not None else None
        if described is not None:
            described.text("name")
            described.flag("strict")  # answers always follow the schema
    if not isinstance(schema, dict):
        raise invalid("response_format.json_schema.schema must be a JSON schema, an object.", "response_format")
    try:
        return schema_grammar(schema)
    except MoeshardError as error:
        raise invalid(
            f"response_format: the schema cannot be heeded: {error}.", "response_format", "unsupported_schema"
        ) from error
