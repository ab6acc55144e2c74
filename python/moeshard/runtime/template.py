"""Chat templates: messages as the text that a model was trained to read.

A model's own template is Jinja, rendered as the transformers library does it, in a sandbox: a template is code of
whoever made the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moeshard._core as _core
from moeshard._core import MoeshardError

if TYPE_CHECKING:
    import jinja2
    from jinja2 import nodes
    from jinja2.parser import Parser

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""From messages, and whether an answer is to follow, to the text."""

HINT = "choose another with --chat-template (template=…): a file, or a name that llama.cpp knows such as chatml"


def own_templates(model: _core.Model) -> dict[str, str]:
    """Return the templates in a model's file, in Jinja, by name; the empty name is that of its default."""
    return {_text(name): _text(source) for name, source in model.chat_templates.items()}


def find_template(model: _core.Model, own: Mapping[str, str], wanted: str) -> Render:
    """Return what renders messages for a model.

    Args:
        model: whose tokens are used.
        own: its `own_templates`.
        wanted: empty for the model's own template; the name of one of several that it has; the name of one that
            llama.cpp knows; a template itself, in Jinja; or the path of a file that holds one.

    Raises:
        MoeshardError: there is none, or it is no template.
    """
    known = model.known_chat_templates()
    if not wanted and "" not in own:
        raise MoeshardError(
            f"{model.path}: the model has no chat template{_named(own)}; {HINT}, or prompt it with plain text"
        )
    if wanted in own:
        source, name = own[wanted], f"the model's chat template{f' {wanted!r}' if wanted else ''}"
    elif wanted in known:
        source, name = wanted, wanted
    elif "{{" in wanted or "{%" in wanted:
        source, name = wanted, "the chat template"
    else:
        source, name = _read(wanted, own, known), f"chat template '{wanted}'"
    if source in known:
        return lambda messages, answer: model.apply_chat_template(_pairs(messages), answer, source)
    return _jinja(source, f"{model.path}: {name}" if wanted in own else name, model)


def _named(own: Mapping[str, str]) -> str:
    names = ", ".join(name for name in own if name)
    return f" that is its default, only: {names}" if names else ""


def _read(path: str, own: Mapping[str, str], known: Sequence[str]) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MoeshardError(f"chat template '{path}' is not UTF-8 text: {error}") from error
    except (OSError, ValueError) as error:
        names = ", ".join([*(name for name in own if name), *known])
        reason = getattr(error, "strerror", None) or error
        raise MoeshardError(f"chat template '{path}': no file ({reason}), nor one of these names: {names}") from error


def _pairs(messages: Sequence[Message]) -> list[tuple[str, str]]:
    pairs = []
    for message in messages:
        role, content = message["role"], message.get("content")
        if not isinstance(content, str):
            raise MoeshardError(f"this chat template takes text alone, but the content of a {role} message is none")
        pairs.append((role, content))
    return pairs


def _jinja(source: str, name: str, model: _core.Model) -> Render:
    tokens = {"bos_token": model.bos_text, "eos_token": model.eos_text}
    known = {key: _text(token) for key, token in tokens.items() if token is not None}
    compiled = _rendered(name, lambda: _compiled(source))

    def render(messages: Sequence[Message], answer: bool) -> str:
        text: str = _rendered(
            name,
            lambda: compiled.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=answer, **known
            ),
        )
        return text

    return render


def _rendered(name: str, act: Callable[[], Any]) -> Any:
    """Return what `act` does with a template, whatever goes wrong in it being a MoeshardError."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

    try:
        return act()
    except TemplateSyntaxError as error:
        raise MoeshardError(f"{name} is no valid Jinja: {error.message}, line {error.lineno}; {HINT}") from error
    except UndefinedError as error:
        raise MoeshardError(f"{name} asks for what is not there: {error.message}; {HINT}") from error
    except TemplateError as error:
        raise MoeshardError(f"{name} refuses these messages: {error}") from error
    except Exception as error:  # a template is a program: it can divide by zero
        raise MoeshardError(f"{name} failed: {type(error).__name__}: {error}; {HINT}") from error


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: marks in templates what is an answer, for training; here its content as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Without the escapes for HTML that Jinja's own has."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
