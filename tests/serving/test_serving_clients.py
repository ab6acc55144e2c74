"""OpenAI's own client against the server: whole, in pieces, asynchronously, given up half-way."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest
from running import Running
from served import held_out

import moeshard
from moeshard import Plan

CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": held_out("de")}]


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tinymoe", "tinymoe@full", "tinymoe@de", "tinymoe@en", "tinymoe@py"]
    assert client.models.retrieve("tinymoe@de").owned_by == "moeshard"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_a_chat_whole_and_in_pieces(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tinymoe", "messages": CHAT, "max_tokens": 24, "seed": 3, "temperature": 0.7}
    whole = client.chat.completions.with_raw_response.create(**options)
    answer = whole.parse()
    assert whole.headers["x-moeshard-node"] == "de" and whole.headers["x-moeshard-reason"] == "placed"
    assert 0.5 <= float(whole.headers["x-moeshard-fit"]) <= 1
    assert answer.object == "chat.completion" and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id != answer.id
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    first = chunks[0].choices[0].delta
    assert first.role == "assistant" and first.content == ""
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-2])
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].choices == []
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text and len(chunks) > 10
    usage = chunks[-1].usage
    assert usage is not None and usage.total_tokens == answer.usage.total_tokens
    # The second time all of the prompt is remembered but its last token.
    details = usage.prompt_tokens_details
    assert details is not None and details.cached_tokens == usage.prompt_tokens - 1


def test_a_stop_text_ends_an_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tinymoe@full", "prompt": "The package manager", "temperature": 0}
    whole = client.completions.create(**options, max_tokens=30).choices[0].text
    stop = whole[10:14]
    cut = client.completions.create(**options, max_tokens=30, stop=[stop, "never there"]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == whole[: whole.index(stop)]


def test_many_at_once(server: Running, model: moeshard.Model, plan: Plan) -> None:
    """More than there are slots, by several nodes, asynchronously: each gets what it would get alone."""

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model=f"tinymoe@{name}", prompt=held_out(name, 80, at), max_tokens=12, temperature=0
                    )
                    for name in ("de", "en", "py")
                    for at in (0, 300, 600)
                )
            )
            return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(ask())
    keeps = {node.name: node.keep for node in plan.nodes}
    wanted = [
        "".join(model.generate(held_out(name, 80, at), keeps[name], max_tokens=12, temperature=0))
        for name in ("de", "en", "py")
        for at in (0, 300, 600)
    ]
    # Batches of other sizes round otherwise, and may tip a token now and then.
    assert sum(text == other for text, other in zip(texts, wanted, strict=True)) >= 7


def test_leaving_ends_the_computation(server: Running, client: openai.OpenAI) -> None:
    def figure(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"moeshard:{name}"))

    aborted = 'request_success_total{finished_reason="abort"'
    before, tokens = figure(aborted), figure("generation_tokens_total")
    stream = client.completions.create(
        model="tinymoe", prompt="Once", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(3):
        next(stream)
    assert figure("num_requests_running") == 1
    stream.close()
    end = time.monotonic() + 30
    while figure(aborted) == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert figure("num_requests_running") == 0 and figure("generation_tokens_total") - tokens < 1000
    # Whole answers too.
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model="tinymoe", prompt="Once", max_tokens=1900, timeout=0.3, extra_body={"ignore_eos": True}
        )
    while figure(aborted) == before + 1:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert figure("num_requests_running") == 0


def test_extras_of_llama_cpp_and_formats(client: openai.OpenAI) -> None:
    ask = client.chat.completions.create
    said = ask(model="tinymoe", messages=CHAT, extra_body={"grammar": 'root ::= "yes" | "no"'}, max_tokens=5)
    assert said.choices[0].message.content in ("yes", "no") and said.choices[0].finish_reason == "stop"
    # Long enough to end where the model cannot run on for ever: the first token that closes the object is forced.
    close = client.with_options(timeout=120).chat.completions.create(
        model="tinymoe", messages=CHAT, response_format={"type": "json_object"}, seed=1, max_tokens=200
    )
    text = close.choices[0].message.content or ""
    assert text.startswith("{")
    if close.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    banned = ask(model="tinymoe", messages=CHAT, temperature=0, max_tokens=1, logprobs=True, top_logprobs=2)
    assert banned.choices[0].logprobs is not None and banned.choices[0].logprobs.content is not None
    entry = banned.choices[0].logprobs.content[0]
    assert entry.top_logprobs[0].token == entry.token and bytes(entry.bytes or []).decode() == entry.token
    ids = httpx.post(f"{str(client.base_url).rsplit('/v1', 1)[0]}/tokenize", json={"content": entry.token}).json()
    again = ask(model="tinymoe", messages=CHAT, temperature=0, max_tokens=1, logit_bias={str(ids["tokens"][0]): -100})
    assert again.choices[0].message.content == entry.top_logprobs[1].token
