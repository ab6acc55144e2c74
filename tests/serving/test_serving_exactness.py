"""What the server says is what the model says: the same tokens, log-probabilities and texts as without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Application, held_out
from running import Running

import moeshard
from moeshard import Plan
from moeshard.serving.auth import Keys
from moeshard.serving.settings import Settings


@pytest.fixture
def fresh(application: Application) -> Iterator[Running]:
    """A server that remembers nothing yet: what is remembered is computed in batches of other sizes."""
    running = Running(lambda: application(settings=Settings(keys=Keys(["one", "two"])))[0])
    yield running
    running.stop()


def post(server: Running, path: str, key: str = "one", **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}{path}", json=body, headers={"authorization": f"Bearer {key}"}, timeout=120)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_node_answers_as_generate_does(fresh: Running, model: moeshard.Model, plan: Plan) -> None:
    keeps = {"full": None, **{node.name: node.keep for node in plan.nodes}}
    for name, keep in keeps.items():
        options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "max_tokens": 30, "seed": 7}
        told = post(fresh, "/v1/completions", model=f"tinymoe@{name}", prompt=held_out("en", 120), **options)
        wanted = model.generate(held_out("en", 120), keep, **options)
        assert told["choices"][0]["text"] == "".join(wanted), name
        assert told["usage"]["completion_tokens"] == len(wanted.tokens)
        missed = told["moeshard"].pop("missed")
        assert told["moeshard"] == {"node": name, "reason": "forced", "detail": told["moeshard"]["detail"], "fit": None}
        assert (missed is None) == (name == "full")


def test_a_chat_without_a_template_is_plain_lines(fresh: Running, model: moeshard.Model) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    told = post(
        fresh, "/v1/chat/completions", model="tinymoe@full", messages=messages, temperature=0, max_tokens=20,
        logprobs=True,
    )  # fmt: skip
    prompt = "system: Be brief.\nuser: Hi\nassistant:"
    wanted = "".join(model.generate(prompt, max_tokens=20, temperature=0, stop=["\nuser:"]))
    assert told["choices"][0]["message"]["content"] == wanted
    tokens = told["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in tokens).decode() == wanted


def test_echo_tells_what_the_prompt_cost(fresh: Running, model: moeshard.Model) -> None:
    text = held_out("fr", 300)
    told = post(fresh, "/v1/completions", model="tinymoe@full", prompt=text, max_tokens=0, echo=True, logprobs=2)
    (choice,) = told["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "length"
    found, tokens = choice["logprobs"], model.tokenize(text, parse=True)
    logits = model.logits(tokens).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    said = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = said[np.arange(len(tokens) - 1), tokens[1:]]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert np.median(np.abs(np.array(found["token_logprobs"][1:]) - wanted)) < 1e-3
    for logprob, top, row in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], said, strict=False):
        # What lm-eval asks: the token was the likeliest if its log-probability is the largest told.
        assert max(top.values()) == pytest.approx(row.max(), abs=0.1) and logprob in top.values()
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text.startswith(token, offset)
    # Token ids instead of a text, several at once, with a token more: as lm-eval asks.
    ids = [tokens[:40].tolist(), tokens[20:60].tolist()]
    both = post(fresh, "/v1/completions", model="tinymoe@full", prompt=ids, max_tokens=1, echo=True, logprobs=1)
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    for asked, choice in zip(ids, both["choices"], strict=True):
        assert len(choice["logprobs"]["tokens"]) == 41
        assert choice["text"].startswith(model.detokenize(asked))
    first = both["choices"][0]["logprobs"]["token_logprobs"][1:40]
    # Two in one batch round otherwise.
    assert np.median(np.abs(np.array(first) - wanted[:39])) < 0.02


def test_nothing_remembered_is_shared_between_keys(fresh: Running) -> None:
    def cached(key: str, **more: Any) -> int:
        body = {"model": "tinymoe@en", "prompt": held_out("en", 500), "max_tokens": 1, **more}
        usage = post(fresh, "/v1/completions", key, **body)["usage"]
        n: int = usage["prompt_tokens_details"]["cached_tokens"]
        assert usage["prompt_tokens"] > 100
        return n

    assert cached("one") == 0 and cached("one") > 100
    assert cached("two") == 0 and cached("two") > 100
    assert cached("one", model="tinymoe@de") == 0  # nor between nodes


def test_the_same_text_streamed(fresh: Running, model: moeshard.Model, plan: Plan) -> None:
    """In pieces, cut at any byte: characters of several bytes come whole."""
    body = {"model": "tinymoe@de", "prompt": held_out("de", 200), "max_tokens": 120, "seed": 5, "stream": True}
    text = ""
    with httpx.stream(
        "POST", f"{fresh.url}/v1/completions", json=body, headers={"x-api-key": "one"}, timeout=120
    ) as answer:
        lines = list(answer.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:
        assert line == "" or line.startswith("data: ")
        if line:
            text += json.loads(line[6:])["choices"][0]["text"]
    keep = next(node.keep for node in plan.nodes if node.name == "de")
    assert text == "".join(model.generate(held_out("de", 200), keep, max_tokens=120, seed=5))
