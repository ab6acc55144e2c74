"""The meter, and the way out: who misses too much goes on elsewhere, between two tokens, and is told so."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from running import Running
from served import DOMAINS, Application, held_out

import moeshard
from moeshard import Plan
from moeshard.placement.meter import Limits
from moeshard.serving.app import build
from moeshard.serving.local import LocalOptions, serve_locally
from moeshard.serving.placer import Placer
from moeshard.serving.settings import Settings

LIMITS = dict.fromkeys(DOMAINS, Limits(reference=0.4, threshold=1.0))


@pytest.fixture(scope="module")
def moving(application: Application) -> Iterator[Running]:
    running = Running(lambda: application(limits=LIMITS)[0])
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(moving: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{moving.url}/v1", api_key="none", max_retries=0)


def figure(server: Running, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"moeshard:{name}"))


def say(client: openai.OpenAI, session: str, prompt: str, n: int, **more: Any) -> tuple[str, list[Any]]:
    """The answer to a prompt as a stream: its text, and its chunks."""
    chunks = list(
        client.completions.create(
            model="tinymoe", prompt=prompt, max_tokens=n, stream=True, temperature=0,
            stream_options={"include_usage": True}, extra_headers={"x-session-id": session},
            extra_body={"repeat_penalty": 1.3, "ignore_eos": True, **more},
        )
    )  # fmt: skip
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices), chunks


def placements(chunks: list[Any]) -> list[dict[str, Any]]:
    return [chunk.moeshard for chunk in chunks if getattr(chunk, "moeshard", None) is not None]


def test_a_session_that_changes_its_domain_is_moved_and_its_answer_is_whole(
    moving: Running, client: openai.OpenAI, model: moeshard.Model, plan: Plan
) -> None:
    first = held_out("de", 300)
    # The next turn begins where the first did, and goes on in another domain.
    prompt = first + "\n\n" + held_out("py", 600, 8000)
    n = 800
    for attempt in range(8):  # the engine runs ahead of who looks: on a busy machine an answer may be over before
        session = f"changes {attempt}"
        before = figure(moving, "replacements_total")
        _, chunks = say(client, session, first, 4)
        assert [place["node"] for place in placements(chunks)] == ["de"]
        text, chunks = say(client, session, prompt, n)
        told = placements(chunks)
        if told[0]["reason"] == "moved":
            break
    node = told[0]["node"]  # what a small model writes at length may be moved again
    assert node in ("py", "en") and {place["reason"] for place in told} == {"moved"}
    assert 0 < told[-1]["missed"] < 1 and 0 < told[-1]["fit"] <= 1
    moved = next(index for index, chunk in enumerate(chunks) if getattr(chunk, "moeshard", None) is not None)
    assert 0 < moved < len(chunks) - 2
    usage = chunks[-1].usage
    tokens = model.tokenize(prompt, parse=True)
    assert (usage.prompt_tokens, usage.completion_tokens) == (tokens.size, n)
    assert figure(moving, "replacements_total") >= before + 1

    # The first tokens are those of the first node, all others those that the second one writes behind them.
    keeps = {one.name: one.keep for one in plan.nodes}
    options: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1.3, "ignore_end": True}
    begun = model.generate(tokens, keeps["de"], max_tokens=n, **options)
    assert text != "".join(begun)
    alike = max(k for k in range(n) if text.startswith(model.detokenize(begun.tokens[:k])))
    found = []
    for k in range(alike, max(-1, alike - 8), -1):
        rest = model.generate(np.concatenate([tokens, begun.tokens[:k]]), keeps[node], max_tokens=12, **options)
        "".join(rest)
        found.append(model.detokenize([*begun.tokens[:k], *rest.tokens]))
    assert any(text.startswith(beginning) for beginning in found)

    # The session goes on from there, and nobody else goes with it.
    _, chunks = say(client, session, prompt + text, 1)
    assert placements(chunks)[-1]["reason"] == "moved"
    _, chunks = say(client, "another", first, 1)
    assert placements(chunks)[-1]["node"] == "de"
    assert figure(moving, "num_requests_running") == 0


def test_a_session_that_does_not_change_stays(moving: Running, client: openai.OpenAI) -> None:
    _, chunks = say(client, "stays", held_out("de", 300), 4)
    _, chunks = say(client, "stays", held_out("de", 900), 60)
    (told,) = placements(chunks)
    assert told["node"] == "de" and told["reason"] == "placed"
    assert 0 < told["missed"] < 0.4
    assert figure(moving, 'missed_mass_count{model_name="tinymoe",node="de"}') >= 2


def test_who_is_asked_for_by_name_answers_to_the_end(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tinymoe@de", prompt=held_out("py", 600, 2000), max_tokens=40, temperature=0
    )
    assert answer.moeshard["node"] == "de"  # type: ignore[attr-defined]
    assert answer.moeshard["missed"] > LIMITS["de"].reference  # type: ignore[attr-defined]


def test_what_is_missed_is_what_the_model_says(server: Running, model: moeshard.Model) -> None:
    """Without limits too; the whole model misses nothing."""
    for name in ("en", "full"):
        body = {"model": f"tinymoe@{name}", "prompt": held_out("fr", 300, 900), "max_tokens": 1, "temperature": 0}
        told = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["moeshard"]
        assert (told["missed"] is None) == (name == "full")
        if name == "en":
            assert 0.3 < told["missed"] < 1


def test_a_shard_file_says_what_it_misses(model: moeshard.Model, plan: Plan, tinymoe: Path, tmp_path: Path) -> None:
    keep = plan.nodes[0].keep
    moeshard.split(tinymoe, keep, tmp_path / "shard.gguf", with_router=True)
    shard = moeshard.Model(tmp_path / "shard.gguf", n_threads=1)
    local = serve_locally(shard, None, LocalOptions(n_slots=1, n_ctx=512))
    running = Running(lambda: build("shard", Placer([], None), local.backends, Settings(), shard))
    try:
        body = {"prompt": held_out("en", 300), "max_tokens": 1, "temperature": 0}
        told = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).json()["moeshard"]
    finally:
        running.stop()
    tokens = model.tokenize(held_out("en", 300), parse=True)
    with model.session(n_ctx=tokens.size) as session:
        session.set_keep(keep, 0)
        session.set_meter(True)
        session.decode({0: tokens})
        assert told["missed"] == pytest.approx(session.missed(0).mean(), abs=0.01)


def test_many_at_once_are_moved_each_by_itself(moving: Running) -> None:
    """With a grammar, which goes on where it was; an answer that is over too soon moves its session all the same."""
    grammar = 'root ::= "<" [a-z ]{400,} ">"'
    first = held_out("de", 300)
    prompts = [f"{first}\n\n{held_out('py', 600, 8000 + 1000 * index)}" for index in range(4)]

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{moving.url}/v1", api_key="none", max_retries=0) as client:

            async def session(index: int, prompt: str) -> None:
                options: dict[str, Any] = {"model": "tinymoe", "extra_headers": {"x-session-id": f"many {index}"}}
                await client.completions.create(prompt=first, max_tokens=1, **options)
                told = await client.completions.create(
                    prompt=prompt, max_tokens=100 + 50 * index, seed=index, extra_body={"grammar": grammar}, **options
                )
                assert re.fullmatch("<[a-z ]+>?", told.choices[0].text)
                end = time.monotonic() + 60
                while told.moeshard["reason"] != "moved":  # type: ignore[attr-defined]
                    assert time.monotonic() < end
                    await asyncio.sleep(0.05)
                    told = await client.completions.create(prompt=first, max_tokens=1, **options)
                assert told.moeshard["node"] != "de"  # type: ignore[attr-defined]

            await asyncio.gather(*(session(index, prompt) for index, prompt in enumerate(prompts)))

    asyncio.run(ask())
    assert figure(moving, "num_requests_running") == 0 and figure(moving, "num_requests_waiting") == 0
