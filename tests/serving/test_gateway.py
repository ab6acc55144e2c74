"""A gateway answers as its nodes do, and sends sessions where the whole model's server would."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from gateways import gateway, post, serve
from running import Running
from served import DOMAINS, held_out

import moeshard
from moeshard import MoeshardError, Plan, PlanNode
from moeshard.serving.auth import Keys
from moeshard.serving.backends import Ask, Event
from moeshard.serving.errors import ApiError, unavailable
from moeshard.serving.failover import is_wanted
from moeshard.serving.gate import Gate
from moeshard.serving.gateway import read_node_keys
from moeshard.serving.protocol import Options
from moeshard.serving.resume import Told, can_resume, continued, resumed
from moeshard.serving.settings import Settings


@pytest.fixture(scope="module")
def shard_models(shards: dict[str, Path]) -> dict[str, moeshard.Model]:
    return {name: moeshard.Model(path, n_threads=1) for name, path in shards.items()}


@pytest.fixture(scope="module")
def nodes(shard_models: dict[str, moeshard.Model]) -> Iterator[dict[str, str]]:
    """A server for each shard."""
    running = {name: serve(model) for name, model in shard_models.items()}
    yield {name: one.url for name, one in running.items()}
    for one in running.values():
        one.stop()


@pytest.fixture(scope="module")
def server(plan: Plan, nodes: dict[str, str], full: str) -> Iterator[Running]:
    running, _ = gateway(plan, nodes, full)
    yield running
    running.stop()


def test_answers_are_those_of_the_shards(server: Running, shard_models: dict[str, moeshard.Model]) -> None:
    options: dict[str, Any] = {
        "temperature": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "repeat_penalty": 1.1, "seed": 7,
        "max_tokens": 30,
    }  # fmt: skip
    for name, shard in shard_models.items():
        body = {"model": f"tinymoe@{name}", "prompt": held_out("en", 120), **options}
        told = post(server.url, body).json()
        wanted = shard.generate(held_out("en", 120), **options)
        assert told["choices"][0]["text"] == "".join(wanted), name
        assert told["usage"]["completion_tokens"] == len(wanted.tokens)
        assert told["usage"]["prompt_tokens"] == len(shard.tokenize(held_out("en", 120)))
        assert told["choices"][0]["finish_reason"] == "length"
        # Token ids, and in pieces.
        ids = shard.tokenize(held_out("fr", 120)).tolist()
        asked = {**body, "prompt": ids, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and answer.headers["x-moeshard-node"] == name
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
        assert text == "".join(shard.generate(ids, **options))


def test_log_probabilities_and_echoes_are_passed_on(server: Running, nodes: dict[str, str]) -> None:
    text = "Größe: " + held_out("de", 150)
    body = {"prompt": text, "max_tokens": 4, "logprobs": 3, "echo": True, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "logprobs": True, "top_logprobs": 2,
            "temperature": 0}  # fmt: skip
    for path, asked in (("/v1/completions", body), ("/v1/chat/completions", chat)):
        own = post(nodes["de"], asked, path=path).json()["choices"]
        through = post(server.url, {**asked, "model": "tinymoe@de"}, path=path).json()["choices"]
        assert through[0].keys() == own[0].keys()
        told, wanted = ((choice["logprobs"].get("content") or choice["logprobs"]) for choice in (through[0], own[0]))
        # What is remembered of a prompt is computed in other batches, which round otherwise.
        assert str(told).count("bytes") == str(wanted).count("bytes")
        if path == "/v1/completions":
            assert through[0]["text"] == own[0]["text"] and told["tokens"] == wanted["tokens"]
            assert told["text_offset"] == wanted["text_offset"] and told["token_logprobs"][0] is None
            assert np.allclose(told["token_logprobs"][1:], wanted["token_logprobs"][1:], atol=0.05)
        else:
            assert [entry["bytes"] for entry in told] == [entry["bytes"] for entry in wanted]


def test_an_answer_that_has_begun_is_continued(server: Running, shard_models: dict[str, moeshard.Model]) -> None:
    shard = shard_models["de"]
    body = {"model": "tinymoe@de", "temperature": 0, "max_tokens": 12, "begun": " Gerade"}
    messages = [{"role": "user", "content": held_out("de", 200)}]
    chat = post(server.url, {**body, "messages": messages}, path="/v1/chat/completions").json()
    begun = shard.tokenize(" Gerade", special=False)
    tokens = [*shard.tokenize(f"user: {held_out('de', 200)}\nassistant:"), *begun]
    assert chat["choices"][0]["message"]["content"] == "".join(shard.generate(tokens, temperature=0, max_tokens=12))
    assert chat["usage"]["prompt_tokens"] == len(tokens)
    ids = shard.tokenize(held_out("en", 200)).tolist()
    told = post(server.url, {**body, "prompt": ids}).json()["choices"][0]["text"]
    assert told == "".join(shard.generate([*ids, *begun], temperature=0, max_tokens=12))


def test_what_can_be_continued() -> None:
    told = Told()
    for event in (Event("a", n_generated=1), Event("bc", n_generated=3), Event("", n_generated=4, finish="length")):
        told.add(event)
    assert told == Told("abc", 4)
    ask = resumed(Ask("p", Options(max_tokens=10), begun="x"), told)
    assert (ask.prompt, ask.begun, ask.options.max_tokens) == ("p", "xabc", 6)
    assert resumed(Ask("p", Options(max_tokens=3)), told).options.max_tokens == 0
    assert resumed(Ask("p", Options()), told).options.max_tokens == -1
    event = continued(Event("d", n_prompt=9, n_generated=1), told)
    assert (event.n_prompt, event.n_generated) == (5, 5)
    assert can_resume(Ask("p", Options()))
    assert not can_resume(Ask("p", Options(grammar='root ::= "a"'))) and not can_resume(Ask("p", Options(echo=True)))
    assert is_wanted("1", False) and not is_wanted("no", True) and is_wanted("", True) and not is_wanted("?", False)


def place(url: str, text: str, key: str = "") -> tuple[str, str, str]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    answer = post(url, body, key, "/v1/chat/completions")
    assert answer.status_code == 200, answer.text
    return (answer.headers["x-moeshard-node"], answer.headers["x-moeshard-reason"],
            answer.headers.get("x-moeshard-fit", ""))  # fmt: skip


TURNS = [held_out(name, size, at) for name in (*DOMAINS, "fr") for at, size in ((0, 60), (700, 150), (1500, 400))] + [
    "Hi"
]


def test_replicas_and_restarted_ones_decide_as_the_whole_models_server(
    server: Running, plan: Plan, nodes: dict[str, str], full: str
) -> None:
    """To the last digit of the fit."""
    wanted = [place(full, turn) for turn in TURNS]
    assert len({node for node, _, _ in wanted}) >= 3
    found = [[place(server.url, turn) for turn in TURNS]]
    for order in (1, -1):  # another replica, then the same begun anew
        other, _ = gateway(plan, nodes, full)
        try:
            found.append([place(other.url, turn) for turn in TURNS[::order]][::order])
        finally:
            other.stop()
    assert found == [wanted] * 3


def test_nodes_tell_for_themselves_where_the_whole_model_cannot(
    model: moeshard.Model, plan: Plan, nodes: dict[str, str], full: str
) -> None:
    wanted = [place(full, turn) for turn in TURNS]
    alone = serve(model)  # the whole model, which knows no plan
    try:
        for where, knows in ((alone.url, True), (None, False)):
            running, found = gateway(plan, nodes, where)
            try:
                told = [place(running.url, turn) for turn in TURNS]
            finally:
                running.stop()
            assert found.measures and ("none is refused" in found.placing()) != knows
            # Up to rounding: what is nearly too close to call, or nearly refused, may fall on the other side.
            for (node, reason, fit), (node_, reason_, fit_) in zip(told, wanted, strict=True):
                if reason == reason_ == "placed":
                    assert node == node_
                assert reason_ != "placed" or reason in ("placed", "unclear")
                assert bool(fit) == knows
                if knows and node == node_:
                    assert abs(float(fit) - float(fit_)) < 0.02
                if not knows:
                    assert reason in ("placed", "unclear")
    finally:
        alone.stop()


def test_what_is_listed(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    names = [model.id for model in client.models.list()]
    assert names == ["tinymoe", "tinymoe@full", "tinymoe@de", "tinymoe@en", "tinymoe@py"]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    shown = httpx.get(f"{server.url}/nodes").json()["data"]
    assert [(node["name"], node["up"], node["slots"]) for node in shown] == [
        (name, True, 2) for name in ("full", *DOMAINS)
    ]
    assert httpx.get(f"{server.url}/props").json()["default_generation_settings"]["n_ctx"] == 2048
    figures = httpx.get(f"{server.url}/metrics").text
    assert 'moeshard:node_up{model_name="tinymoe",node="de"} 1.0' in figures and "kv_cache" not in figures
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tinymoe@fr", prompt="a")
    with pytest.raises(openai.BadRequestError, match="token id 4096"):
        client.completions.create(model="tinymoe@de", prompt=[4096])
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tinymoe@de", prompt="many words " * 2000)
    assert caught.value.code == "context_length_exceeded"


def figure(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"moeshard:{name}"))


def test_leaving_ends_the_computation_at_the_node(server: Running, nodes: dict[str, str]) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model="tinymoe@en", prompt="Once", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(3):
        next(stream)
    assert figure(nodes["en"], "num_requests_running") == 1
    stream.close()
    end = time.monotonic() + 30
    while figure(nodes["en"], "num_requests_running") or figure(server.url, "num_requests_running"):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert figure(nodes["en"], "generation_tokens_total") < 1500


def test_keys_part_what_nodes_remember_and_guard_them(
    shard_models: dict[str, moeshard.Model], plan: Plan, nodes: dict[str, str], full: str
) -> None:
    guarded = serve(shard_models["de"], keys=Keys(["inner"]))
    settings = Settings(keys=Keys(["one", "two"]))
    try:
        for path in ("/moeshard/losses", "/moeshard/render"):
            assert post(guarded.url, {"prompt": "a"}, path=path).status_code == 401
        wrong, _ = gateway(plan, {**nodes, "de": guarded.url}, full, node_keys={"": "no"}, survey=False)
        try:
            down = {node["name"]: node["fault"] for node in httpx.get(f"{wrong.url}/nodes").json()["data"]}
            assert "does not take the gateway's API key" in down["de"] and down["en"] is None
        finally:
            wrong.stop()
        running, _ = gateway(plan, {**nodes, "de": guarded.url}, full, settings=settings, node_keys={"de": "inner"})
        try:

            def cached(key: str) -> int:
                told = post(running.url, {"model": "tinymoe@de", "prompt": held_out("en", 500), "max_tokens": 1}, key)
                n: int = told.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                return n

            assert cached("one") == 0 and cached("one") > 100
            assert cached("two") == 0 and cached("two") > 100
            assert post(running.url, {"prompt": "a"}).status_code == 401
        finally:
            running.stop()
    finally:
        guarded.stop()
    assert read_node_keys("# ours\nall\nde  only\n", nodes) == {"": "all", "de": "only"}
    with pytest.raises(MoeshardError, match="line 2"):
        read_node_keys("all\nnobody key", nodes)


def test_a_node_gets_no_more_than_its_slots_and_the_queue_is_small(
    plan: Plan, nodes: dict[str, str], full: str
) -> None:
    running, found = gateway(plan, nodes, full, n_waiting=3)
    body = {"model": "tinymoe@py", "prompt": "Once", "max_tokens": 100, "ignore_eos": True}
    node = next(one for one in found.backends if one.name == "py")

    async def flood() -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            tasks = [asyncio.ensure_future(client.post(f"{running.url}/v1/completions", json=body)) for _ in range(8)]
            most = 0
            while not all(task.done() for task in tasks):
                most = max(most, node.load.waiting)
                told = (await client.get(f"{nodes['py']}/nodes")).json()["data"][0]
                assert told["running"] + told["waiting"] <= 2
                await asyncio.sleep(0.005)
            assert most == 3
            answers = [task.result() for task in tasks]
            assert {a.json()["error"]["code"] for a in answers if a.status_code != 200} == {"queue_full"}
            return sorted(answer.status_code for answer in answers)

    try:
        assert asyncio.run(flood()) == [200] * 5 + [429] * 3
        assert node.load.share == 0
    finally:
        running.stop()


def test_a_gate_lets_owners_in_by_turns_and_loses_no_place() -> None:
    async def run() -> None:
        gate, order = Gate(4), list[str]()

        async def enter(owner: str, seconds: float = 60) -> None:
            async with gate.inside(owner, seconds):
                order.append(owner)
                await asyncio.sleep(0.001)

        first = asyncio.ensure_future(enter("a"))
        await asyncio.sleep(0)
        flood = [asyncio.ensure_future(enter("a")) for _ in range(4)]
        await asyncio.sleep(0)
        late = asyncio.ensure_future(enter("b"))  # makes the last of the flood give way
        await asyncio.sleep(0)
        assert (gate.running, gate.waiting) == (1, 4)
        flood[1].cancel()
        found = await asyncio.gather(first, *flood, late, return_exceptions=True)
        assert [type(one).__name__ for one in found] == [
            "NoneType", "NoneType", "CancelledError", "NoneType", "ApiError", "NoneType",
        ]  # fmt: skip
        assert order == ["a", "a", "b", "a"] and (gate.running, gate.waiting) == (0, 0)
        gate.resize(2)
        async with gate.inside("a", 1), gate.inside("a", 1):
            with pytest.raises(ApiError) as caught:
                await enter("b", 0.01)
            assert caught.value.status == 504
            waits = asyncio.ensure_future(enter("b"))
            await asyncio.sleep(0)
            gate.refuse_all(unavailable("gone"))
            with pytest.raises(ApiError, match="gone"):
                await waits
            # Cancelled in the very moment in which its turn comes.
            waits = asyncio.ensure_future(enter("b"))
            await asyncio.sleep(0)
            gate.resize(3)
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
            assert gate.running == 2
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(run())


def test_who_is_not_what_the_plan_says_is_refused(
    plan: Plan, nodes: dict[str, str], full: str, shard_models: dict[str, moeshard.Model], server: Running
) -> None:
    def refused(nodes: dict[str, str], full: str | None, plan: Plan = plan) -> str:
        with pytest.raises(MoeshardError) as caught:
            gateway(plan, nodes, full)
        return str(caught.value)

    swapped = {**nodes, "de": nodes["en"]}
    assert "--node de" in (said := refused(swapped, full)) and "other experts than the plan says of node 'de'" in said
    assert "not hold the whole model" in refused(nodes, nodes["de"])
    fewer = Plan([*plan.nodes[:2], PlanNode("py", plan.nodes[0].keep)], "other", {}, plan.model)
    assert "--node py" in refused(nodes, full, fewer) or "serves another plan" in refused(nodes, full, fewer)
    foreign = Plan(plan.nodes, "foreign", {}, replace(plan.model, fingerprint="0" * 64))
    assert "another model than the plan is for" in refused(nodes, None, foreign)
    # Nor is a gateway a node, or what is no URL.
    assert "neither moeshard serve nor llama-server" in refused(nodes, server.url)
    for url in ("127.0.0.1:8080", "ftp://a", "http://", "http://a:b", "http://key@a"):
        assert "--node de" in refused({**nodes, "de": url}, full)
    assert "no such node; it has de, en, py" in refused({**nodes, "fr": nodes["en"]}, full)
    assert "give --node de=URL" in refused({"en": nodes["en"]}, full)
    # A server of all nodes may be any of them.
    running, _ = gateway(plan, {**nodes, "de": f"{full}/v1/"}, full)
    try:
        assert place(running.url, held_out("de"))[0] == "de"
    finally:
        running.stop()


def test_a_node_that_comes_later_is_found(
    shard_models: dict[str, moeshard.Model], plan: Plan, nodes: dict[str, str], full: str
) -> None:
    first = serve(shard_models["de"])
    port = int(first.url.rpartition(":")[2])
    first.stop()
    running, _ = gateway(plan, {**nodes, "de": first.url}, full)
    turn = held_out("de")
    try:
        assert httpx.get(f"{running.url}/health").json() == {"status": "degraded", "down": ["de"]}
        answer = post(running.url, {"prompt": turn, "max_tokens": 1})
        assert (answer.headers["x-moeshard-node"], answer.headers["x-moeshard-reason"]) == ("full", "down")
        assert "de cannot answer now" in answer.json()["moeshard"]["detail"]
        forced = post(running.url, {"model": "tinymoe@de", "prompt": turn, "max_tokens": 1})
        assert forced.status_code == 503 and "cannot be reached" in forced.json()["error"]["message"]
        # What comes up there must be the node.
        for name, fault in (("en", "other experts"), ("de", "")):
            second = serve(shard_models[name], port=port)
            try:
                end = time.monotonic() + 30
                while fault not in str(shown := httpx.get(f"{running.url}/nodes").json()["data"][1]["fault"]) or (
                    shown is not None and not fault
                ):
                    assert time.monotonic() < end
                    time.sleep(0.02)
                answer = post(running.url, {"prompt": held_out("de", 400, 900 if fault else 1500), "max_tokens": 1})
                assert answer.headers["x-moeshard-node"] == ("full" if fault else "de")
                # The session that was there when the node was down stays where its prefix is.
                answer = post(running.url, {"prompt": turn, "max_tokens": 1})
                assert answer.headers["x-moeshard-node"] == "full"
            finally:
                second.stop()
    finally:
        running.stop()
