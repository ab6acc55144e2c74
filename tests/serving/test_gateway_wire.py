"""A node that says that it is well and fails nevertheless: silent, standing still, broken off, ended half-way."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import held_out
from gateways import gateway, serve
from relay import Fault, Relay
from running import Running

import moeshard
from moeshard import Plan
from moeshard.serving import health as health_
from moeshard.serving.gateway import connect
from moeshard.serving.health import FAILURES, Health
from moeshard.serving.node_errors import NodeError, told
from moeshard.serving.remote import Deadlines, RemoteBackend

SOON = Deadlines(connect=5.0, first=3.0, between=2.0, total=60.0, poll=0.2, health=10.0)


@pytest.fixture(scope="module")
def house(model: moeshard.Model, plan: Plan, shards: dict[str, Path]) -> Iterator[tuple[Running, Relay, RemoteBackend]]:
    """A gateway, and the line to its node `de`."""
    full, de = serve(model, plan), serve(moeshard.Model(shards["de"], n_threads=1))
    relay = Relay(de.url)
    running, found = gateway(plan, {"de": relay.url, "en": full.url, "py": full.url}, full.url, deadlines=SOON)
    yield running, relay, next(one for one in found.backends if one.name == "de")
    running.stop()
    relay.stop()
    de.stop()
    full.stop()


@pytest.fixture(autouse=True)
def mended(house: tuple[Running, Relay, RemoteBackend]) -> Iterator[None]:
    yield
    house[1].fault = ""
    house[2]._health = Health("de")
    end = time.monotonic() + 20
    while house[2].fault is not None:
        assert time.monotonic() < end
        time.sleep(0.02)


def read(url: str, at: int, resume: bool = False, **more: Any) -> tuple[str, list[dict[str, Any]], bool]:
    """Return who answered, the chunks, and whether they ended as they should."""
    body = {"prompt": held_out("de", 300, at), "max_tokens": 60, "seed": 1, "stream": True, "ignore_eos": True, **more}
    headers = {"x-session-id": secrets.token_hex(8), "x-moeshard-resume": "1" if resume else "0"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line and line[0] != ":"]
        return answer.headers["x-moeshard-node"], [json.loads(x) for x in lines if x != "[DONE]"], lines[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("fault", "cause"), [("stall", "timeout"), ("cut", "cut"), ("end", "cut"), ("garble", "answer")]
)
def test_what_fails_half_way(house: tuple[Running, Relay, RemoteBackend], fault: Fault, cause: str) -> None:
    running, relay, _ = house
    relay.fault = fault
    node, chunks, done = read(running.url, 700, model="tinymoe@de")
    assert node == "de" and not done and len(chunks) > 1
    assert chunks[-1]["error"]["code"] == ("timeout" if cause == "timeout" else "node_failed")
    assert all("error" not in chunk for chunk in chunks[:-1])
    # A session, whose client wants it continued.
    node, chunks, done = read(running.url, 700, resume=True)
    assert node == "de" and done and chunks[-1]["moeshard"]["moved"]["from"] == "de"
    figures = httpx.get(f"{running.url}/metrics").text
    assert f'failovers_total{{model_name="tinymoe",node="de",reason="{cause}"}}' in figures


def test_what_never_begins(house: tuple[Running, Relay, RemoteBackend]) -> None:
    running, relay, node = house
    relay.fault = "silent"
    begin = time.monotonic()
    who, chunks, done = read(running.url, 1500)
    assert (who, chunks[-1]["moeshard"]["reason"], done) == ("full", "down", True)
    assert "moved" not in chunks[-1]["moeshard"]
    assert SOON.first <= time.monotonic() - begin
    # Nothing is streamed: so all of it can be begun anew, however late it fails.
    relay.fault = "stall"
    body = {"prompt": held_out("de", 300, 700) + ".", "max_tokens": 60, "ignore_eos": True}
    told_ = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30)
    assert told_.status_code == 200 and told_.json()["usage"]["completion_tokens"] == 60
    assert told_.headers["x-moeshard-node"] == "full" and "moved" not in told_.json()["moeshard"]
    assert node.load.share == 0


def test_a_node_that_keeps_failing_is_left_alone(
    house: tuple[Running, Relay, RemoteBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, relay, node = house
    monkeypatch.setattr(health_, "COOL_SECONDS", 0.5)
    node._health._cool = 0.5
    relay.fault = "cut"
    for _ in range(FAILURES):
        assert node.fault is None
        assert not read(running.url, 700, model="tinymoe@de")[2]
    assert node.fault is not None and "3 requests in a row failed" in node.fault
    refused = httpx.post(f"{running.url}/v1/completions", json={"model": "tinymoe@de", "prompt": "a"}, timeout=30)
    assert refused.status_code == 503 and "3 requests in a row" in refused.json()["error"]["message"]
    assert httpx.get(f"{running.url}/health").json() == {"status": "degraded", "down": ["de"]}
    end = time.monotonic() + 20
    while node.fault is not None:  # after a while it is tried again
        assert time.monotonic() < end
        time.sleep(0.02)
    relay.fault = ""
    assert read(running.url, 700, model="tinymoe@de")[2]
    assert node._health._failures == 0 and node._health._cool == 0.5


def test_health() -> None:
    one = Health("n")
    assert one.fault is not None
    one.well()
    one.silent("late")
    assert one.fault is None and one.is_silent and not one.is_lost  # a moment's business
    one.silent("late")
    assert one.fault == "late" and not one.is_lost
    one.silent("late")
    assert one.is_lost
    one.well()
    assert one.fault is None and not one.is_lost
    one.failed(NodeError("connect", "gone"))
    assert one.fault == "gone"
    one.well()
    # What a request may have brought about by itself closes nobody off.
    for _ in range(10):
        one.failed(NodeError("status", "no token fits the grammar"))
    assert one.fault is None
    for _ in range(FAILURES):
        one.failed(NodeError("cut", "broke off"))
    assert one.fault is not None and "broke off" in one.fault


def test_what_nodes_say_of_errors() -> None:
    def error(status: int, body: Any = None, **headers: str) -> Any:
        return told("n", status, {"error": body} if body is not None else {}, headers)

    assert error(401).cause == "key" and error(403).is_ours
    assert error(429, **{"retry-after": "7"}).headers["Retry-After"] == "7" and not error(429).is_ours
    assert error(501).code == "not_supported"
    overlong = error(400, {"type": "exceed_context_size_error", "message": "m", "code": 400})
    assert (overlong.status, overlong.code, overlong.message) == (400, "context_length_exceeded", "m")
    assert error(400, {"message": "m", "param": "stop", "code": "c"}).to_json()["error"] == {
        "message": "m", "type": "invalid_request_error", "param": "stop", "code": "c",
    }  # fmt: skip
    assert error(504).cause == "timeout" and error(500, {"message": "m"}).cause == "status"
    assert error(404).is_ours and error(418, "no object").is_ours


def test_a_gateway_ends_whatever_its_polls_do(plan: Plan, house: tuple[Running, Relay, RemoteBackend]) -> None:
    """A cancellation that comes in the very moment in which a poll is answered must not be lost."""
    url = house[1].url
    busy = replace(SOON, poll=0.001)

    async def run() -> None:
        for n in range(60):
            node = next(one for one in connect(
                plan, dict.fromkeys(("de", "en", "py"), url), None, keys={}, n_waiting=1, deadlines=busy,
                share_cache=True,
            ).backends if one.name == "de")  # fmt: skip
            await node.start()
            await asyncio.sleep(n / 5000)
            done, _ = await asyncio.wait({asyncio.ensure_future(node.stop())}, timeout=20)
            assert done

    asyncio.run(run())
