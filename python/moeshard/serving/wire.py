"""What a node is asked over HTTP, and what its answers mean: `moeshard serve`, or llama.cpp's llama-server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moeshard.serving.backends import Ask, Event, Finish, Scored
from moeshard.serving.errors import unsupported
from moeshard.serving.protocol import Options, prompt_json

_RAW = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)", re.ASCII)

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "eos": "stop", "word": "stop", "limit": "length"}


class Reading(Protocol):
    """Reads one answer, chunk by chunk."""

    def event(self, chunk: Mapping[str, Any]) -> Event | None:
        """Return what a chunk tells, if it tells anything yet."""

    @property
    def last(self) -> Event | None:
        """The event that ends the answer, once it has come."""


def _sampling(options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "frequency_penalty",
                     "presence_penalty")
    }  # fmt: skip
    if options.seed is not None:
        found["seed"] = options.seed
    if options.grammar:
        found["grammar"] = options.grammar
    return {**found, "stop": list(options.stop), "ignore_eos": options.ignore_end, "stream": True}


# `moeshard serve`.


def moeshard_request(ask: Ask, model: str) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request to `moeshard serve`."""
    options = ask.options
    prompt = prompt_json(ask.prompt)
    body = {
        **prompt,
        **_sampling(options),
        "model": model,
        "max_tokens": options.max_tokens,
        "logit_bias": {str(token): bias for token, bias in options.logit_bias},
        "stream_options": {"include_usage": True},
    }
    if ask.begun:
        body["begun"] = ask.begun
    scored = options.n_logprobs >= 0
    if "messages" in prompt:
        if scored:
            body.update(logprobs=True, top_logprobs=options.n_logprobs)
        return "/v1/chat/completions", body
    if scored:
        body["logprobs"] = options.n_logprobs
    body["echo"] = options.echo
    return "/v1/completions", body


class MoeshardReading:
    """Reads the stream of `moeshard serve`."""

    def __init__(self) -> None:
        self._n = 0
        self._finish: Finish | None = None
        self._missed: float | None = None
        self.last: Event | None = None

    def event(self, chunk: Mapping[str, Any]) -> Event | None:
        self._missed = (chunk.get("moeshard") or {}).get("missed", self._missed)
        for choice in chunk.get("choices") or ():
            self._finish = _FINISH.get(choice.get("finish_reason") or "", self._finish)
            delta = choice.get("delta")
            text = (delta.get("content") if delta is not None else choice.get("text")) or ""
            scored = _scored(choice.get("logprobs"))
            if text or scored:
                self._n += max(1, len(scored))
                return Event(text=text, n_generated=self._n, logprobs=scored)
        usage = chunk.get("usage")
        if usage and self._finish:
            self.last = Event(
                n_prompt=usage["prompt_tokens"],
                n_cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
                n_generated=usage["completion_tokens"],
                finish=self._finish,
                missed=self._missed,
            )
        return None


def _scored(told: Mapping[str, Any] | None) -> tuple[Scored, ...]:
    if not told:
        return ()
    if "content" in told:
        return tuple(_entry(entry) for entry in told["content"] or ())
    tops = told.get("top_logprobs") or [None] * len(told["tokens"])
    return tuple(
        Scored(-1, _token_bytes(token), logprob, tuple((_token_bytes(other), of) for other, of in (top or {}).items()))
        for token, logprob, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
    )


def _entry(entry: Mapping[str, Any]) -> Scored:
    top: Sequence[Mapping[str, Any]] = entry.get("top_logprobs") or ()
    return Scored(-1, bytes(entry["bytes"]), entry["logprob"], tuple((bytes(o["bytes"]), o["logprob"]) for o in top))


def _token_bytes(text: str) -> bytes:
    """Undo `moeshard.serving.replies.token_text`."""
    raw = _RAW.fullmatch(text)
    return bytes.fromhex(raw[1].replace("\\x", "")) if raw else text.encode()


# llama-server, by its own /completion: what its OpenAI endpoints make of an answer (reasoning, tool calls) is another
# text than other nodes give.


def llama_request(ask: Ask, prompt: str | Sequence[int | str], share_cache: bool) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request to llama-server.

    Args:
        ask: what is asked.
        prompt: its prompt, rendered.
        share_cache: whether it may use what it remembers of other prompts.

    Raises:
        ApiError: 501, it cannot do that.
    """
    options = ask.options
    if options.echo and options.n_logprobs >= 0:
        raise unsupported("this node is a llama-server, which tells no log-probabilities of a prompt", "echo")
    body = {
        **_sampling(options),
        "prompt": prompt,
        "n_predict": options.max_tokens,
        "logit_bias": [[token, bias] for token, bias in options.logit_bias],
        "n_probs": max(1, options.n_logprobs) if options.n_logprobs >= 0 else 0,
        "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
        "cache_prompt": share_cache,
    }
    return "/completion", body


class LlamaReading:
    """Reads the stream of llama-server's /completion."""

    def __init__(self, ask: Ask) -> None:
        self._n_top = ask.options.n_logprobs
        self._before = ask.prompt if ask.options.echo and isinstance(ask.prompt, str) else ""
        self._only_prompt = ask.options.max_tokens == 0  # it writes a token nevertheless
        self.last: Event | None = None

    def event(self, chunk: Mapping[str, Any]) -> Event | None:
        n = 0 if self._only_prompt else chunk.get("tokens_predicted", 0)
        text, before = "" if self._only_prompt else chunk.get("content") or "", self._before
        scored = tuple(
            Scored(
                entry["id"],
                bytes(entry["bytes"]),
                entry["logprob"],
                tuple((bytes(other["bytes"]), other["logprob"]) for other in entry["top_logprobs"][: self._n_top]),
            )
            for entry in chunk.get("completion_probabilities") or ()
            if self._n_top >= 0 and not self._only_prompt
        )
        if chunk.get("stop"):
            cached = (chunk.get("timings") or {}).get("cache_n", 0)
            self.last = Event(
                text=text,
                prompt_text=before,
                n_prompt=chunk.get("tokens_evaluated", 0),
                n_cached=cached,
                n_generated=n,
                finish=_FINISH.get(chunk.get("stop_type", ""), "length"),
            )
            return None
        if not (text or scored):
            return None
        self._before = ""
        return Event(text=text, prompt_text=before, n_generated=n, logprobs=scored)
