"""Where sessions go: a pure function of plan and first turn, the same for every replica; load and faults beside it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from running import Running
from served import DOMAINS, Application, held_out

from moeshard import Plan
from moeshard.placement.decision import Placed, place_by_loss
from moeshard.serving.auth import Keys
from moeshard.serving.errors import ApiError
from moeshard.serving.placer import LOAD_GAP, Losses, Placer, State, choose, first_turn, session_key
from moeshard.serving.protocol import Message, chat_request, completion_request
from moeshard.serving.settings import Settings

IDLE = {name: State(True, 0.0) for name in ("full", "a", "b", "c")}


def placed(*excess: float, noise: float = 0.0) -> Placed:
    """Nodes a, b, c … that predict a turn of 64 tokens so much worse than the whole model."""
    rng = np.random.default_rng(0)
    full = rng.uniform(1, 5, 63)
    losses = [full + nats + noise * rng.normal(size=63) for nats in excess]
    return place_by_loss("abcdef"[: len(excess)], losses, full)


def but(**states: State | None) -> dict[str, State]:
    return {name: state for name, state in {**IDLE, **states}.items() if state is not None}


def test_a_clear_winner_has_the_session_whatever_its_load() -> None:
    decision = choose(placed(0.1, 0.5, 0.6), "key", but(a=State(True, 9.0)))
    assert (decision.backend, decision.reason) == ("a", "placed")
    assert decision.fit == pytest.approx(np.exp(-0.1))


def test_a_refused_session_goes_to_who_holds_everything_or_nowhere() -> None:
    refused = placed(0.8, 0.9)
    assert (choose(refused, "key", IDLE).backend, choose(refused, "key", IDLE).reason) == ("full", "refused")
    for states in (but(full=None), but(full=State(False, 0.0))):
        with pytest.raises(ApiError) as caught:
            choose(refused, "key", states)
        assert caught.value.status == 503 and "nobody who holds the whole model is up" in caught.value.message


def test_what_is_too_close_to_call_is_spread_by_key_and_moved_by_load_alone() -> None:
    close = placed(0.1, 0.1, 0.6, noise=0.01)
    assert set(close.candidates) == {"a", "b"}
    keys = [f"key {number}" for number in range(200)]
    spread = Counter(choose(close, key, IDLE).backend for key in keys)
    assert set(spread) == {"a", "b"} and min(spread.values()) > 60
    # Little differences of load move nobody: replicas that see a little more or less decide alike.
    for load in (0.0, 0.99 * LOAD_GAP):
        assert [choose(close, key, but(a=State(True, load))).backend for key in keys] == [
            choose(close, key, IDLE).backend for key in keys
        ]
    assert {choose(close, key, but(a=State(True, LOAD_GAP))).backend for key in keys} == {"b"}
    assert {choose(close, key, but(a=State(False, 0.0))).backend for key in keys} == {"b"}


def test_who_is_down_is_replaced_by_the_whole_model_or_the_next_that_is_good_enough() -> None:
    clear = placed(0.1, 0.3, 0.9)
    down = State(False, 0.0)
    assert (choose(clear, "key", but(a=down)).backend, choose(clear, "key", but(a=down)).reason) == ("full", "down")
    assert choose(clear, "key", but(a=down, full=None)).backend == "b"
    with pytest.raises(ApiError) as caught:
        choose(clear, "key", but(a=down, b=None, full=down))
    assert caught.value.status == 503


def test_where_nobody_holds_everything_nothing_is_refused() -> None:
    placer = Placer(["a", "b", "c"], None)
    losses = np.array([[9.0] * 63, [8.0] * 63, [10.0] * 63])
    decision = choose(placer.decide(Losses(losses, None, 64, 0)), "key", but(full=None))
    assert decision.backend == "b"
    short = placer.decide(Losses(np.empty((3, 0)), None, 3, 0))
    assert {choose(short, f"key {n}", but(full=None)).backend for n in range(50)} == {"a", "b", "c"}
    # Where somebody does, too short a turn goes there.
    decision = choose(placer.decide(Losses(np.empty((3, 0)), np.empty(0), 3, 0)), "key", IDLE)
    assert (decision.backend, decision.reason) == ("full", "short")


def key(scope: str = "", model: str = "m", body: dict[str, Any] | None = None, **headers: str) -> str:
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return session_key(scope, model, named, chat_request({**chat, **(body or {})}))


def test_session_keys() -> None:
    later = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "v"},
        ],
        "temperature": 0.1,
    }
    assert key() == key() == key(body=later)
    different = [
        key(),
        key("other"),
        key(model="n"),
        key(body={"messages": [{"role": "user", "content": "u"}]}),
        key(body={"messages": [{"role": "system", "content": "su"}, {"role": "user", "content": ""}]}),
        key(x_session_id="1"),
        key("other", x_session_id="1"),
        key(body={"prompt_cache_key": "2"}),
        key(x_openwebui_chat_id="3"),
        session_key("", "m", {}, completion_request({"prompt": "u"})),
        session_key("", "m", {}, completion_request({"prompt": [1, 2]})),
    ]
    assert len(set(different)) == len(different)
    # The first of these counts.
    assert key(body={"prompt_cache_key": "2"}, x_session_id="1", x_openwebui_chat_id="3") == key(x_session_id="1")
    assert key(body={"prompt_cache_key": "2"}, x_openwebui_chat_id="3") == key(body={"prompt_cache_key": "2"})


def test_first_turns() -> None:
    chat = tuple(Message(role, role) for role in ("system", "user", "assistant", "user"))
    assert first_turn(chat) == chat[:2] and first_turn(chat[:1]) == chat[:1]
    assert first_turn("text") == "text" and first_turn((1, 2)) == (1, 2)


def place_all(server: Running, turns: Iterable[list[dict[str, str]]]) -> list[tuple[str, str]]:
    def ask(messages: list[dict[str, str]]) -> tuple[str, str]:
        body = {"messages": messages, "max_tokens": 1}
        headers = {"authorization": "Bearer k"}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-moeshard-node"], answer.headers.get("x-moeshard-fit", "")

    return [ask(messages) for messages in turns]


def test_replicas_decide_alike_in_any_order_and_later_in_a_session(application: Application) -> None:
    """To the last digit of the fit: what is measured does not hang on what else was or is computed."""
    turns = [
        [{"role": "user", "content": held_out(name, size, at)}]
        for name in (*DOMAINS, "fr")
        for at, size in ((0, 60), (700, 150), (1500, 400))
    ]
    later = [
        [*turn, {"role": "assistant", "content": "Well."}, {"role": "user", "content": held_out("en", 100)}]
        for turn in turns
    ]
    found = []
    for order, asked in ((1, turns), (-1, turns), (1, later)):
        running = Running(lambda: application(settings=Settings(keys=Keys(["k"])))[0])
        try:
            found.append(place_all(running, asked[::order])[::order])
        finally:
            running.stop()
    assert found[0] == found[1] == found[2]
    nodes = [node for node, _ in found[0]]
    # German is unlike the others, which a short turn may not tell apart.
    assert set(nodes[1:3]) == {"de"} and "de" not in nodes[3:9] and len(set(nodes)) >= 3


def test_a_session_stays_and_is_probed_once(application: Application) -> None:
    _, local = application()

    class Counting:
        n = 0

        async def losses(self, prompt: Any) -> Losses:
            self.n += 1
            assert local.prober is not None
            return await local.prober.losses(prompt)

    async def run() -> None:
        prober = Counting()
        placer = Placer(DOMAINS, prober)
        states = {name: State(True, 0.0) for name in ("full", *DOMAINS)}
        await local.start()
        try:
            prompt = (Message("user", held_out("de")),)
            all_of_them = await asyncio.gather(*(placer.place("key", prompt, lambda: states) for _ in range(5)))
            assert prober.n == 1 and {decision.backend for decision, _ in all_of_them} == {"de"}
            # Under the same key it stays, whatever comes; a node that is down gives it up, without another probe.
            other = (Message("user", held_out("py", 400, 1500)),)
            assert (await placer.place("key", other, lambda: states))[0].backend == "de"
            states["de"] = replace(states["de"], up=False)
            assert (await placer.place("key", prompt, lambda: states))[0].backend == "full"
            assert prober.n == 1
            # One who leaves while its session is placed holds nobody up.
            leaving = asyncio.ensure_future(placer.place("other", other, lambda: states))
            await asyncio.sleep(0)
            leaving.cancel()
            assert (await placer.place("third", other, lambda: states))[0].backend in ("en", "py")
            assert all(not lane.jobs for lane in local.engine.lanes)
        finally:
            await local.stop()

    asyncio.run(run())


def test_only_one_way_without_a_plan(application: Application, plan: Plan) -> None:
    running = Running(lambda: application(False)[0])
    try:
        answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert (answer.headers["x-moeshard-node"], answer.headers["x-moeshard-reason"]) == ("full", "only")
        names = [model["id"] for model in httpx.get(f"{running.url}/v1/models").json()["data"]]
        assert names == ["tinymoe", "tinymoe@full"]
    finally:
        running.stop()
