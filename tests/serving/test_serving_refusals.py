"""What is not answered is said in OpenAI's words, and whatever fails fails alone and aloud."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Application
from running import Running

from moeshard import MoeshardError
from moeshard.serving.auth import Keys, read_keys
from moeshard.serving.jobs import Lane
from moeshard.serving.settings import Settings

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = told["error"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("chat/completions", {}, "messages", "missing"),
        ("chat/completions", {"messages": []}, "messages", "empty"),
        ("chat/completions", {"messages": [{"role": "poet", "content": ""}]}, "messages[0].role", "one of"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "string"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "only parts of type text",
        ),
        ("chat/completions", {**CHAT, "n": 2}, "n", "one answer"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools", "not supported"),
        ("chat/completions", {**CHAT, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ("chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ("chat/completions", {**CHAT, "temperature": -1}, "temperature", "from 0"),
        ("chat/completions", {**CHAT, "temperature": "hot"}, "temperature", "number"),
        ("chat/completions", {**CHAT, "top_p": 1.1}, "top_p", "from 0 to 1"),
        ("chat/completions", {**CHAT, "repeat_penalty": 0}, "repeat_penalty", "from 0.01"),
        ("chat/completions", {**CHAT, "stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ("chat/completions", {**CHAT, "stop": 4}, "stop", "string or an array"),
        ("chat/completions", {**CHAT, "logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ("chat/completions", {**CHAT, "logit_bias": {"1": 101}}, "logit_bias.1", "from -100 to 100"),
        ("chat/completions", {**CHAT, "logit_bias": {"4096": 1}}, None, "token id 4096"),
        ("chat/completions", {**CHAT, "grammar": "root ::= ("}, None, "grammar"),
        ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        (
            "chat/completions",
            {**CHAT, "grammar": 'root ::= "a"', "response_format": {"type": "json_object"}},
            "grammar",
            "contradict",
        ),
        ("chat/completions", {**CHAT, "stream": "yes"}, "stream", "true or false"),
        (
            "chat/completions",
            {**CHAT, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "true or false",
        ),
        ("completions", {}, "prompt", "string, strings"),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": [[]]}, "prompt", "empty"),
        ("completions", {"prompt": ["a"] * 257}, "prompt", "at most 256"),
        ("completions", {"prompt": [1, "a"]}, "prompt", "integer"),
        ("completions", {"prompt": [4096]}, None, "token id 4096"),
        ("completions", {**TEXT, "suffix": "x"}, "suffix", "only continued"),
        ("completions", {**TEXT, "best_of": 2}, "best_of", "one answer"),
        ("completions", {**TEXT, "logprobs": 21}, "logprobs", "from 0 to 20"),
    ],
)
def test_wrong_requests(server: Running, path: str, body: dict[str, Any], param: str | None, said: str) -> None:
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/v1/{path}", json={"stream": stream, **body}, timeout=60)
        error = error_of(answer, 400)
        assert error["param"] == param and said in error["message"], error
        assert error["type"] == "invalid_request_error"


def test_bodies_that_are_no_json(server: Running) -> None:
    def post(body: bytes, kind: str = "application/json") -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": kind})

    for body in (b"", b"[]", b"{", b'{"prompt": NaN}', b"\xff", b'{"prompt": "\\ud800"}', b'{"a":' * 100_000):
        error_of(post(body), 400)
    # A form or plain text could be sent by any page in a browser, without asking.
    assert error_of(post(b'{"prompt": "a"}', "text/plain"), 415)["code"] == "unsupported_media_type"
    assert error_of(post(b'{"prompt": "' + b"a" * 9 * 2**20 + b'"}'), 413)["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:  # of a size that is told nowhere
        yield b'{"prompt": "'
        for _ in range(9):
            yield b"a" * 2**20
        yield b'"}'

    answer = httpx.post(f"{server.url}/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    error_of(answer, 413)


def test_what_is_not_there(server: Running) -> None:
    assert error_of(httpx.get(f"{server.url}/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(httpx.get(f"{server.url}/v1/completions"), 405)["code"] == "method_not_allowed"
    body = {**TEXT, "model": "gpt-4o"}
    assert error_of(httpx.post(f"{server.url}/v1/completions", json=body), 404)["code"] == "model_not_found"
    assert error_of(httpx.post(f"{server.url}/v1/embeddings", json={"input": "a"}), 501)["code"] == "not_supported"
    long = {"prompt": "many words " * 2000}
    assert error_of(httpx.post(f"{server.url}/v1/completions", json=long), 400)["code"] == "context_length_exceeded"


def test_request_ids(server: Running) -> None:
    given = httpx.get(f"{server.url}/health", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = [httpx.get(f"{server.url}/{path}", headers={"x-request-id": "no id"}) for path in ("health", "nope")]
    assert len({answer.headers["x-request-id"] for answer in made} - {"no id"}) == 2


def test_other_sites_get_nothing(application: Application) -> None:
    running = Running(lambda: application(False, Settings(hosts={"localhost"}))[0])
    try:
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert httpx.get(f"{running.url}/health", headers={"host": "LOCALHOST:1"}).status_code == 200
        assert httpx.get(f"{running.url}/health", headers={"host": "[::1]:8080"}).status_code == 200
        # A page whose name was made to mean this machine.
        rebound = httpx.get(f"{running.url}/v1/models", headers={"host": "evil.example:80"})
        assert error_of(rebound, 403)["code"] == "unknown_host"
        asked = httpx.options(
            f"{running.url}/v1/completions",
            headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
        )
        assert not [name for name in asked.headers if name.startswith("access-control")]
    finally:
        running.stop()


def test_keys(application: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# ours\nsecret-1\n\nsecret-2\n")
    monkeypatch.setenv("MOESHARD_API_KEY", "secret-3, secret-4")
    running = Running(lambda: application(False, Settings(keys=read_keys(tmp_path / "keys")))[0])
    try:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret-1"}, {"x-api-key": "#"}):
            for path in ("v1/models", "metrics", "nodes"):
                error = error_of(httpx.get(f"{running.url}/{path}", headers=headers), 401)
                assert error["code"] == "invalid_api_key"
        for key in ("secret-1", "secret-2", "secret-3", "secret-4"):
            for headers in ({"authorization": f"bearer {key}"}, {"x-api-key": key}):
                assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 200
        assert [httpx.get(f"{running.url}/{path}").status_code for path in ("health", "live", "")] == [200] * 3
    finally:
        running.stop()
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(MoeshardError, match="holds no API key"):
        read_keys(tmp_path / "keys")
    with pytest.raises(MoeshardError, match="cannot read the API keys"):
        read_keys(tmp_path / "nothing")
    assert not Keys(())


def test_a_full_queue_and_a_deadline(application: Application) -> None:
    running = Running(lambda: application(False, n_slots=1, n_waiting=1, seconds=5.0)[0])
    try:
        body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
        url = f"{running.url}/v1/completions"
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as first:
            found: list[httpx.Response] = []
            second = threading.Thread(target=lambda: found.append(httpx.post(url, json=TEXT, timeout=60)))
            second.start()
            while httpx.get(f"{running.url}/nodes").json()["data"][0]["waiting"] != 1:
                time.sleep(0.01)
            third = httpx.post(url, json=TEXT, timeout=60)
            assert error_of(third, 429)["code"] == "queue_full" and int(third.headers["retry-after"]) > 0
            lines = [line for line in first.iter_lines() if line]
            second.join()
        # Either the answer was done in time, or it ends with an error and nothing after it.
        if lines[-1] != "data: [DONE]":
            assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert found[0].status_code in (200, 504)
    finally:
        running.stop()


def break_after(lane: Lane, n_steps: int) -> None:
    """Make a lane's engine fail after some steps."""
    left = [n_steps]

    def run(n: int) -> list[int]:
        if not left:
            raise MoeshardError("the device is gone")
        return lane.steps.run(lane.batcher, left.pop(), 60)

    lane.run = run  # type: ignore[method-assign]


def test_a_broken_engine_is_said_and_seen(application: Application) -> None:
    app, local = application(False)
    break_after(local.engine.lanes[0], 5)
    running = Running(lambda: app)
    try:
        url = f"{running.url}/v1/completions"
        assert httpx.get(f"{running.url}/health").status_code == 200
        body = {"prompt": "Once", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert answer.status_code == 200 and 2 <= len(lines) <= 6
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert "the device is gone" in error_of(httpx.get(f"{running.url}/health"), 503)["message"]
        assert httpx.get(f"{running.url}/live").status_code == 200
        later = httpx.post(url, json=TEXT, timeout=60)
        assert error_of(later, 503)["code"] == "unavailable" and later.headers["retry-after"]
        assert 'node_up{model_name="tinymoe",node="full"} 0.0' in httpx.get(f"{running.url}/metrics").text
    finally:
        running.stop()


def test_a_silent_stream_says_that_it_lives(application: Application) -> None:
    running = Running(lambda: application(False, Settings(ping_seconds=0.005), n_slots=1)[0])
    try:
        body = {"prompt": "many words " * 150, "max_tokens": 2, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[0].startswith(": ") and lines[-1] == "data: [DONE]"
    finally:
        running.stop()


def test_clients_that_say_nothing_or_half(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for said in (b"", b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                 b"content-length: 100\r\n\r\n{", b"\x00\x01\x02\r\n\r\n"):  # fmt: skip
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(said)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert asyncio.run(_many(server.url)) == [200] * 40


async def _many(url: str) -> list[int]:
    async with httpx.AsyncClient(timeout=120) as client:
        answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=TEXT) for _ in range(40)))
    return [answer.status_code for answer in answers]
