"""Messages as text and as tokens, in which control tokens are the template's and never the messages'.

Somebody who writes ``<|im_end|><|im_start|>system`` into a message must not end it. So it has to be known of each
control token in the rendered text who wrote it. Templates are programs, and change what they are given; so the messages
are rendered a second time with marks in them, characters that occur nowhere else:

1. Around each text. Where the marked rendering without its marks is the plain one, it is known of every character who
   wrote it, and a control token counts only where all of it is the template's.
2. Otherwise (the template trims, or cuts out thoughts), within every control token that a message contains. Then no
   control token that is whole in a message counts.
3. A control token that the template itself looks for in messages (to cut at it) cannot be marked. If any of it is left
   in the text, it is not known whose it is, and the messages are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

import moeshard._core as _core
from moeshard._core import MoeshardError
from moeshard.runtime.template import Message, Render, find_template, own_templates

Span = tuple[int, int]


class Chat:
    """What formats messages for one model."""

    def __init__(self, model: _core.Model):
        self._model = model
        self._own = own_templates(model)

    def text(self, messages: Sequence[Message], template: str, answer: bool) -> str:
        """Return the text, without a token at its beginning that the tokenizer adds by itself."""
        return self._without_bos(self._render(template)(_checked(messages), answer))

    def tokens(self, messages: Sequence[Message], template: str, answer: bool) -> npt.NDArray[np.int32]:
        """Return int32 (n,): the tokens of the text, the one that begins every text included.

        Raises:
            MoeshardError: see rule 3 above.
        """
        render = self._render(template)
        checked = _checked(messages)
        plain = render(checked, answer)
        written = sorted({plain[slice(*span)] for span in self._control_spans(plain)})
        strangers = []
        if written:
            strangers = foreign_spans(lambda marked: render(marked, answer), checked, plain, written)
        text = self._without_bos(plain)
        cut = len(plain) - len(text)
        strangers = [(first - cut, last - cut) for first, last in strangers if first >= cut]
        body = self._tokenize(text, True) if not strangers else self._around(text, written, strangers)
        bos = self._model.tokenize("", True, False)[:1] if self._model.adds_bos else body[:0]
        return np.concatenate([bos, body]).astype(np.int32, copy=False)

    def _render(self, template: str) -> Render:
        return find_template(self._model, self._own, template)

    @cached_property
    def _control(self) -> dict[str, int]:
        """How each control token is written, and its id."""
        texts = {text.decode("utf-8", errors="replace"): token for token, text in self._model.control_tokens.items()}
        texts.pop("", None)
        return texts

    def _control_spans(self, text: str) -> Iterator[Span]:
        """Yield where control tokens are in a text. Some models have thousands of them: each is not looked for."""
        end = 0
        for match in self._beginnings.finditer(text):
            start = match.start()
            for length in self._lengths[match[0]] if start >= end else ():
                if text[start : start + length] in self._control:
                    end = start + length
                    yield start, end
                    break

    @cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """How long control tokens that begin with a character are, the longest first."""
        lengths: dict[str, set[int]] = {}
        for token in self._control:
            lengths.setdefault(token[0], set()).add(len(token))
        return {first: sorted(own, reverse=True) for first, own in lengths.items()}

    @cached_property
    def _beginnings(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._lengths)) or "(?!)")

    def _without_bos(self, text: str) -> str:
        bos = self._model.bos_text
        return text.removeprefix(bos.decode("utf-8", errors="replace")) if bos and self._model.adds_bos else text

    def _tokenize(self, text: str, parse: bool) -> npt.NDArray[np.int32]:
        return self._model.tokenize(text, False, parse)

    def _around(self, text: str, written: Sequence[str], strangers: Iterable[Span]) -> npt.NDArray[np.int32]:
        """Tokenize as the engine does, which cuts at control tokens first, but cut at the template's own only."""
        foreign = set(strangers)
        pieces, end = [], 0
        for span in _occurrences(written, text):
            if span in foreign:
                continue
            pieces.append(self._tokenize(text[end : span[0]], False))
            pieces.append(np.array([self._control[text[slice(*span)]]], dtype=np.int32))
            end = span[1]
        return np.concatenate([*pieces, self._tokenize(text[end:], False)])


def _checked(messages: Sequence[Message]) -> list[Message]:
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MoeshardError(f"message {number} has no role: messages are {{'role': 'user', 'content': '…'}}")
    return list(messages)


def _occurrences(tokens: Sequence[str], text: str) -> list[Span]:
    """Where control tokens are in a text, the longest one where several begin."""
    if not tokens:
        return []
    longest = sorted(tokens, key=len, reverse=True)
    return [match.span() for match in re.finditer("|".join(map(re.escape, longest)), text)]


def foreign_spans(
    render: Callable[[Sequence[Message]], str], messages: Sequence[Message], plain: str, tokens: Sequence[str]
) -> list[Span]:
    """Return where in a rendered text control tokens are of which not every character is the template's.

    Args:
        render: from messages to text.
        messages: what was rendered.
        plain: what became of them.
        tokens: the control tokens in it.

    Raises:
        MoeshardError: the template treats control tokens in messages in such a way that this cannot be told.
    """
    for name in _names(messages):
        if any(token in name for token in tokens):
            raise MoeshardError(f"a message has the role or key {name!r}, which contains a control token of the model")
    texts = set(_strings(messages))
    first, last, within = _unused_characters("".join([plain, *texts]), 3)
    found = _occurrences(tokens, plain)

    spans = _marked_texts(_try(render, _changed(messages, lambda text: first + text + last)), first, last, texts, plain)
    if spans is not None:
        owned = np.zeros(len(plain) + 1, dtype=np.bool_)
        for start, end in spans:
            owned[start:end] = True
        return [span for span in found if owned[slice(*span)].any()]

    inside = [token for token in tokens if any(token in text for text in texts)]

    def marked(chosen: Sequence[str]) -> tuple[bool, list[int]]:
        """Render with marks within these; whether it changed nothing else, and where the marks are."""
        text = _try(render, _changed(messages, lambda text: _mark_within(text, chosen, within)))
        places, stripped = _take_out(text or "", within)
        return stripped == plain, places

    same, places = marked(inside)
    if not same:
        looked_for = [token for token in inside if not marked([token])[0]]
        same, places = marked([token for token in inside if token not in looked_for])
        left = [token for token in looked_for if token in plain]
        if not same or left:
            raise MoeshardError(
                f"a message contains {', '.join(map(repr, left or inside))}, which the chat template looks for: it "
                f"cannot be told from the template's own control tokens; take it out of the message"
            )
    marks = set(places)
    return [span for span in found if any(place in marks for place in range(span[0] + 1, span[1] + 1))]


def _strings(value: Any) -> Iterator[str]:
    """Yield all texts of messages, however deep, but for roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from () if key == "role" else _strings(item)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from _strings(item)


def _names(value: Any) -> Iterator[str]:
    """Yield what templates compare and what is therefore not marked: roles, and the keys of mappings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from [item] if key == "role" and isinstance(item, str) else _names(item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _names(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return messages with every text changed but for roles."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _changed(item, change) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_changed(item, change) for item in value]
    return value


def _try(render: Callable[[Sequence[Message]], str], messages: Any) -> str | None:
    try:
        return render(messages)
    except MoeshardError:
        return None  # the template refuses the marks; nothing is known by them


def _unused_characters(text: str, count: int) -> list[str]:
    """Return private-use characters that are not in a text."""
    codes = chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))
    return list(islice((chr(code) for code in codes if chr(code) not in text), count))


def _marked_texts(text: str | None, first: str, last: str, texts: set[str], plain: str) -> list[Span] | None:
    """Return where in `plain` whole texts of messages are, or None where the marks do not say that."""
    if text is None:
        return None
    spans: list[Span] = []
    pieces: list[str] = []
    length = 0
    for number, piece in enumerate(text.split(first)):
        inside, mark, after = piece.partition(last) if number else ("", "", piece)
        if number and (not mark or inside not in texts):
            return None
        if last in after:
            return None
        spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return spans if "".join(pieces) == plain else None


def _mark_within(text: str, tokens: Sequence[str], mark: str) -> str:
    for start, _ in reversed(_occurrences(tokens, text)):
        text = text[: start + 1] + mark + text[start + 1 :]
    return text


def _take_out(text: str, mark: str) -> tuple[list[int], str]:
    """Return where marks are, as places in the text without them, and that text."""
    pieces = text.split(mark)
    places, length = [], 0
    for piece in pieces[:-1]:
        length += len(piece)
        places.append(length)
    return places, "".join(pieces)
