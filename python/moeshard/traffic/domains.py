"""Text to measure on: domains of sequences of tokens, from files, chats or the package."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeshard._core import MoeshardError
from moeshard.arrays import Tokens
from moeshard.files.text import readable
from moeshard.traffic.embedded import Part, embedded_domains, embedded_text

if TYPE_CHECKING:
    from moeshard.runtime.model import Model


class Conversation(str):
    """A document made of messages in a model's chat template, and how that model reads it."""

    tokens: Tokens
    """int32 (n,): control tokens are those of the template, not what a message looks like."""

    def __new__(cls, text: str, tokens: Tokens) -> Conversation:
        made = super().__new__(cls, text)
        made.tokens = tokens
        return made


def tokens_of(model: Model, document: str) -> Tokens:
    """Return int32 (n,): a document of a domain as a model reads it."""
    return document.tokens if isinstance(document, Conversation) else model.tokenize(document)


class TextWarning(UserWarning):
    """Something of a chat was not read."""


@dataclass(frozen=True)
class Domain:
    """One kind of traffic, as documents that have nothing to do with each other."""

    name: str
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the texts, in hex."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(data)}\n".encode())
            digest.update(data)
        return digest.hexdigest()


def check_names(domains: Sequence[Domain]) -> None:
    """Raise a `MoeshardError` where two domains have one name."""
    names = [domain.name for domain in domains]
    if len(set(names)) != len(names):
        raise MoeshardError(f"two domains have one name: {', '.join(names)}")


def read_texts(
    files: Sequence[str],
    chats: Sequence[str | os.PathLike[str]] = (),
    *,
    model: Model | None = None,
    template: str = "",
) -> list[Domain]:
    """Read text files, each written ``FILE`` or ``NAME=FILE``, and chats; several files may make one domain.

    Args:
        files: UTF-8 texts; the domain's name is the file's without its ending where none is given.
        chats: files with a JSON object per line, ``{"messages": [{"role": …, "content": …}, …]}``; each becomes a
            document in the model's chat template. A content may also be a list of parts, of which those of type
            ``text`` are read, or null beside tool calls.
        model: for the template.
        template: instead of the model's own; see `moeshard.Model.chat_prompt`.

    Warns:
        TextWarning: of what was not read of a chat, such as images and tool calls.

    Raises:
        MoeshardError: a file cannot be read, is empty, or a line of a chat is not one; it names file and line.
    """
    found: dict[str, list[str]] = {}
    for spec in files:
        name, path = name_and_path(spec)
        text = _read(path)
        if not text.strip():
            raise MoeshardError(f"text '{path}' is empty")
        found.setdefault(readable(name), []).append(text)
    for chat in chats:
        found.setdefault(readable(Path(chat).stem), []).extend(_read_chat(os.fspath(chat), model, template))
    return [Domain(name, tuple(texts)) for name, texts in found.items()]


def name_and_path(spec: str) -> tuple[str, str]:
    """Return the domain that a text ``FILE`` or ``NAME=FILE`` belongs to, and the file."""
    name, separator, path = spec.partition("=")
    if not separator or os.path.isfile(spec):
        return Path(spec).stem, spec
    if not name:
        raise MoeshardError(f"text '{spec}': there is no name before the '='; write NAME=FILE")
    return name, path


def embedded_traffic(part: Part) -> list[Domain]:
    """Return the texts of the package: ``calibration`` to choose experts with, ``heldout`` to score on."""
    return [Domain(name, (embedded_text(name, part),)) for name in embedded_domains()]


def texts_seen(domains: Sequence[Domain], record: object) -> list[str]:
    """Return the names of domains whose text experts were chosen by.

    Args:
        domains: to be measured on.
        record: what says that: the fact ``texts`` of a profile or the parameter ``texts`` of a plan, digests by domain.
            Where it is anything else, nothing is known of them.
    """
    known = set(map(str, record.values())) if isinstance(record, dict) else set()
    return [domain.name for domain in domains if domain.digest in known]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MoeshardError(f"text '{path}' is not UTF-8: {error}") from error
    except (OSError, ValueError) as error:
        raise MoeshardError(f"cannot read text '{path}': {getattr(error, 'strerror', None) or error}") from error


def _read_chat(path: str, model: Model | None, template: str) -> list[str]:
    documents: list[str] = []
    skipped: Counter[str] = Counter()
    # Only there: JSON strings may hold other line separators, such as U+2028.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        messages = _messages(line, f"{path}, line {number}", skipped)
        if not any(message["content"].strip() for message in messages):
            skipped["empty chat"] += 1
            continue
        if model is None:
            raise MoeshardError(f"chat '{path}' needs a model, whose chat template it is written in")
        try:
            # A conversation that ends with the model's answer is whole: no other answer begins.
            answer = messages[-1]["role"] != "assistant"
            text = model.chat_prompt(messages, template=template, answer=answer)
            documents.append(Conversation(text, model.chat_tokens(messages, template=template, answer=answer)))
        except MoeshardError as error:
            raise MoeshardError(f"{path}, line {number}: {error}") from error
    if not documents:
        raise MoeshardError(f"chat '{path}' is empty" + (" but for what is no text" if skipped else ""))
    if skipped:
        listed = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in sorted(skipped.items()))
        warnings.warn(f"chat '{path}': not read: {listed}", TextWarning, stacklevel=3)  # where read_texts was called
    return documents


def _messages(line: str, where: str, skipped: Counter[str]) -> list[dict[str, str]]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MoeshardError(f"{where}: is not JSON: {error}") from error
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise MoeshardError(f"{where}: expected {_CHAT}")
    return [_message(message, where, skipped) for message in messages]


_CHAT = '{"messages": [{"role": "user", "content": "…"}, …]}'


def _message(message: Any, where: str, skipped: Counter[str]) -> dict[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise MoeshardError(f"{where}: expected {_CHAT}")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls:
        skipped["tool call"] += len(calls) if isinstance(calls, list) else 1
    if isinstance(content, str):
        text = content
    elif isinstance(content, list):
        text = "\n".join(_parts(content, where, skipped))  # as llama.cpp joins them
    elif content is None and ("content" in message or calls):
        text = ""
    else:
        raise MoeshardError(f"{where}: expected {_CHAT}")
    shown = readable(text)
    if shown != text:
        skipped["lone surrogate"] += sum(a != b for a, b in zip(text, shown, strict=True))
    return {"role": readable(role), "content": shown}


def _parts(parts: list[Any], where: str, skipped: Counter[str]) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif isinstance(kind, str) and kind != "text":
            skipped[f"'{readable(kind)}' part"] += 1
        else:
            raise MoeshardError(f'{where}: expected parts such as {{"type": "text", "text": "…"}} in a content')
