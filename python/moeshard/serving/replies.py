"""OpenAI's answers: what came of prompts, as objects or as chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeshard.serving.backends import Event, Scored
from moeshard.serving.decision import Decision
from moeshard.serving.failover import Course
from moeshard.serving.protocol import Request


@dataclass
class Choice:
    """One answer, while it grows."""

    index: int
    parts: list[Event] = field(default_factory=list)
    n_chars: int = 0
    """Of text that was told with log-probabilities: where the next token begins."""

    @property
    def last(self) -> Event:
        return self.parts[-1]


class Replies:
    """The answers to one request."""

    def __init__(self, request: Request, model: str, course: Course):
        """`model` is the one that the client asked for."""
        self._request, self._course = request, course
        kind = "chat.completion" if request.is_chat else "text_completion"
        self._kind = f"{kind}.chunk" if request.is_chat and request.stream else kind
        self._head = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": self._kind,
            "created": int(time.time()),
            "model": model,
        }
        self._choices = [Choice(index) for index in range(len(request.prompts))]
        self._told: Decision | None = None

    # Whole.

    def add(self, index: int, event: Event) -> None:
        """Take what came of an answer."""
        self._choices[index].parts.append(event)

    def whole(self) -> dict[str, Any]:
        """Return the object of all answers, once they are done."""
        choices = [self._whole_choice(choice) for choice in self._choices]
        return {**self._head, "choices": choices, "usage": self._usage(), "moeshard": self._placement()}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        text = "".join(part.prompt_text + part.text for part in choice.parts)
        scored = [entry for part in choice.parts for entry in (*part.prompt_logprobs, *part.logprobs)]
        content = {"message": {"role": "assistant", "content": text}} if self._request.is_chat else {"text": text}
        return self._choice(choice, content, text, scored, choice.last.finish)

    # In chunks.

    def opening(self) -> Iterable[dict[str, Any]]:
        """Yield what comes before any text."""
        if self._request.is_chat:
            delta = {"role": "assistant", "content": ""}
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._chunk([choice])

    def chunks(self, index: int, event: Event) -> Iterable[dict[str, Any]]:
        """Yield what an event tells; a chat's last chunk holds no text but why it ended."""
        choice = self._choices[index]
        choice.parts = [event]
        moved = self._told is not None and self._told is not self._course.decision
        self._told = self._course.decision
        text = event.prompt_text + event.text
        scored = [*event.prompt_logprobs, *event.logprobs]
        if self._request.is_chat:
            if text or scored:
                said = self._choice(choice, {"delta": {"content": text}}, text, scored, None)
                yield self._chunk([said], told=moved)
            if event.finish is not None:
                ended = {"index": index, "delta": {}, "logprobs": None, "finish_reason": event.finish}
                yield self._chunk([ended], told=True)
        else:
            told = moved or event.finish is not None
            yield self._chunk([self._choice(choice, {"text": text}, text, scored, event.finish)], told=told)

    def closing(self) -> Iterable[dict[str, Any]]:
        """Yield what comes after all answers."""
        if self._request.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]], told: bool = False) -> dict[str, Any]:
        usage = {"usage": None} if self._request.include_usage else {}
        own = {"moeshard": self._placement()} if told else {}
        return {**self._head, "choices": choices, **usage, **own}

    # Parts of both.

    def _choice(
        self, choice: Choice, content: dict[str, Any], text: str, scored: Sequence[Scored], finish: str | None
    ) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self._request.options.n_logprobs >= 0:
            logprobs = (
                self._chat_logprobs(scored) if self._request.is_chat else self._text_logprobs(choice, text, scored)
            )
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _chat_logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        content = [
            {
                **_token(entry.data, entry.logprob or 0.0),
                "top_logprobs": [_token(data, logprob) for data, logprob in entry.top],
            }
            for entry in scored
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, choice: Choice, text: str, scored: Sequence[Scored]) -> dict[str, Any]:
        offsets = text_offsets([entry.data for entry in scored], text, choice.n_chars)
        choice.n_chars += len(text)
        return {
            "tokens": [token_text(entry.data) for entry in scored],
            "token_logprobs": [entry.logprob for entry in scored],
            "top_logprobs": [_top(entry) for entry in scored],
            "text_offset": offsets,
        }

    def _usage(self) -> dict[str, Any]:
        ends = [choice.last for choice in self._choices if choice.parts]
        n_prompt, n_answer = sum(end.n_prompt for end in ends), sum(end.n_generated for end in ends)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": sum(end.n_cached for end in ends)},
        }

    def _placement(self) -> dict[str, Any]:
        decision = self._course.decision
        ends = [choice.last.missed for choice in self._choices if choice.parts]
        missed = [share for share in ends if share is not None]
        return {
            "node": decision.backend,
            "reason": decision.reason,
            "detail": decision.detail,
            "fit": None if decision.fit is None else round(decision.fit, 4),
            "missed": round(sum(missed) / len(missed), 4) if missed else None,
            **({"moved": self._course.moved} if self._course.moved else {}),
        }


def token_text(data: bytes) -> str:
    """Return a token as text; what is no UTF-8 by itself as ``bytes:\\xe2``, so that tokens stay distinct."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(data), "logprob": logprob, "bytes": list(data)}


def _top(entry: Scored) -> dict[str, float] | None:
    """Return the likeliest tokens and, as OpenAI has it, the token itself where it is none of them."""
    if entry.logprob is None:
        return None
    found = {token_text(data): logprob for data, logprob in entry.top}
    found.setdefault(token_text(entry.data), entry.logprob)
    return found


def text_offsets(pieces: Sequence[bytes], text: str, start: int) -> list[int]:
    """Return where each token begins in a text, in characters.

    Tokens that the text does not show (one that marks its beginning) take no place in it; of a first space that the
    tokenizer added only the rest counts.
    """
    data, at, chars = text.encode("utf-8"), 0, start
    offsets = []
    for piece in pieces:
        offsets.append(chars)
        for shown in (piece, piece.removeprefix(b" ")):
            if shown and data.startswith(shown, at):
                at += len(shown)
                chars += sum(byte & 0xC0 != 0x80 for byte in shown)
                break
    return offsets
