"""A stock llama-server with a shard file as a node: that of the wheel `xllamacpp`, which has nothing to do with this
project, and one of the pin where ``MOESHARD_LLAMA_SERVER`` says where it is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import gateway, post
from processes import free_port
from relay import Relay
from running import Running
from served import DOMAINS, held_out

import moeshard
from moeshard import Plan
from moeshard.serving.auth import Keys
from moeshard.serving.settings import Settings

PROGRAM = os.environ.get("MOESHARD_LLAMA_SERVER", "")

# As docs/serving.md has it.
OPTIONS = ["-np", "2", "--no-kv-unified", "--cache-ram", "0", "--no-cache-idle-slots"]

WHEEL = """
import sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.kv_unified = 4096, 2, False
params.cache_ram_mib, params.cache_idle_slots = 0, False
params.n_gpu_layers, params.cpuparams.n_threads, params.warmup = 0, 1, False
server = xllamacpp.Server(params)
sys.stdin.read()
"""


@pytest.fixture(scope="module", params=["wheel", "program"])
def stock(request: pytest.FixtureRequest, shards: dict[str, Path]) -> Iterator[str]:
    """The node `de` as a llama-server."""
    port = free_port()
    path = str(shards["de"])
    if request.param == "program":
        if not PROGRAM:
            pytest.skip("MOESHARD_LLAMA_SERVER is not the path of a llama-server")
        command = [PROGRAM, "-m", path, "--port", str(port), "-c", "4096", "-t", "1", "--no-warmup", *OPTIONS]
    else:
        if importlib.util.find_spec("xllamacpp") is None:
            pytest.skip("xllamacpp is not installed: pip install '.[test]'")
        command = [sys.executable, "-c", WHEEL, path, str(port)]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # of sanitizers
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < end
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def nodes(stock: str, full: str) -> dict[str, str]:
    """The other nodes are masks on the whole model."""
    return {"de": stock, "en": full, "py": full}


@pytest.fixture(scope="module")
def server(plan: Plan, nodes: dict[str, str], full: str) -> Iterator[Running]:
    running, found = gateway(plan, nodes, full)
    assert [one.kind for one in found.backends] == ["moeshard", "llama-server", "moeshard", "moeshard"]
    yield running
    running.stop()


def test_it_answers_as_the_shard_does(server: Running, shards: dict[str, Path]) -> None:
    shard = moeshard.Model(shards["de"], n_threads=1)
    agree = 0
    for at in range(0, 1200, 200):
        body = {"model": "tinymoe@de", "prompt": held_out("de", 150, at), "temperature": 0, "max_tokens": 12}
        told = post(server.url, body).json()
        wanted = shard.generate(body["prompt"], temperature=0, max_tokens=12)
        agree += told["choices"][0]["text"] == "".join(wanted)
        assert told["usage"]["prompt_tokens"] == len(shard.tokenize(str(body["prompt"])))
        assert told["usage"]["completion_tokens"] == 12 and told["choices"][0]["finish_reason"] == "length"
    # Another version of llama.cpp rounds otherwise, which may tip a token of a text now and then.
    assert agree >= 4
    # Token ids, a stop text, a bias, nothing but the prompt.
    ids = shard.tokenize(held_out("de", 150)).tolist()
    text = "".join(shard.generate(ids, temperature=0, max_tokens=12))
    asked = {"model": "tinymoe@de", "prompt": ids, "temperature": 0, "max_tokens": 12}
    assert post(server.url, asked).json()["choices"][0]["text"] == text
    cut = post(server.url, {**asked, "stop": [text[5:9]]}).json()["choices"][0]
    assert cut["text"] == text[: text.index(text[5:9])] and cut["finish_reason"] == "stop"
    first = shard.tokenize(text, special=False)[0]
    biased = post(server.url, {**asked, "logit_bias": {str(first): -100}}).json()["choices"][0]["text"]
    assert biased and not biased.startswith(shard.detokenize([first]))
    only = post(server.url, {**asked, "max_tokens": 0}).json()
    assert only["choices"][0]["text"] == "" and only["usage"]["completion_tokens"] == 0
    forced = post(server.url, {**asked, "grammar": 'root ::= "yes" | "no"'}).json()["choices"][0]
    assert forced["text"] in ("yes", "no")


def test_chats_are_written_as_the_model_reads_them(server: Running, shards: dict[str, Path]) -> None:
    """Not by the template that llama-server takes where the model has none."""
    shard = moeshard.Model(shards["de"], n_threads=1)
    messages = [{"role": "system", "content": "Kurz."}, {"role": "user", "content": held_out("de", 200)}]
    body = {"model": "tinymoe@de", "messages": messages, "temperature": 0, "max_tokens": 10, "logprobs": True,
            "top_logprobs": 2}  # fmt: skip
    told = post(server.url, body, path="/v1/chat/completions").json()
    prompt = f"system: Kurz.\nuser: {held_out('de', 200)}\nassistant:"
    assert told["usage"]["prompt_tokens"] == len(shard.tokenize(prompt))
    entries = told["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == told["choices"][0]["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in entries)


def test_sessions_are_placed_on_it(server: Running) -> None:
    body = {"prompt": held_out("de", 400), "max_tokens": 30, "stream": True, "logprobs": 1, "echo": False}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert (answer.headers["x-moeshard-node"], answer.headers["x-moeshard-reason"]) == ("de", "placed")
    assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["moeshard"]["node"] == "de"


def test_what_it_cannot_do_is_done_by_the_whole_model_or_said(server: Running, full: str) -> None:
    body: dict[str, Any] = {"prompt": held_out("de", 400), "max_tokens": 0, "echo": True, "logprobs": 1}
    told = post(server.url, body)
    assert (told.headers["x-moeshard-node"], told.headers["x-moeshard-reason"]) == ("full", "unable")
    assert "no log-probabilities of a prompt" in told.json()["moeshard"]["detail"]
    assert told.json()["choices"][0]["logprobs"]["tokens"] == post(
        full, {**body, "model": "tinymoe@full"}
    ).json()["choices"][0]["logprobs"]["tokens"]  # fmt: skip
    assert post(server.url, {**body, "echo": False, "max_tokens": 1}).headers["x-moeshard-node"] == "de"
    forced = post(server.url, {**body, "model": "tinymoe@de"})
    assert forced.status_code == 501 and forced.json()["error"]["code"] == "not_supported"
    # An echo alone is put before the answer here.
    told = post(server.url, {"model": "tinymoe@de", "prompt": "Wie", "max_tokens": 3, "echo": True})
    assert told.json()["choices"][0]["text"].startswith("Wie")
    long = post(server.url, {"model": "tinymoe@de", "prompt": "viele Worte " * 2000})
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"


def test_leaving_frees_its_slot(server: Running, stock: str) -> None:
    body = {"model": "tinymoe@de", "prompt": "Es", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    headers = {"x-conversation-id": "one"}  # which would switch that off, if it were passed on
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60, headers=headers) as answer:
        pieces = answer.iter_bytes()
        assert next(pieces)
        (busy,) = [slot["id"] for slot in httpx.get(f"{stock}/slots").json() if slot["is_processing"]]
    end = time.monotonic() + 30
    while (slot := httpx.get(f"{stock}/slots").json()[busy])["is_processing"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert slot["n_prompt_tokens"] < 500  # of the 512 that it would have written


def test_clients_of_several_keys_share_nothing_that_it_remembers(plan: Plan, nodes: dict[str, str], full: str) -> None:
    for keys, shares in ((["one"], True), (["one", "two"], False)):
        running, _ = gateway(plan, nodes, full, settings=Settings(keys=Keys(keys)))
        try:
            body = {"model": "tinymoe@de", "prompt": held_out("de", 500, 900), "max_tokens": 1}
            cached = [
                post(running.url, body, key).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                for key in (keys[0], keys[0], keys[-1])
            ]
            assert (max(cached) > 100) == shares and (shares or cached == [0, 0, 0])
        finally:
            running.stop()


def test_an_answer_that_it_loses_is_continued(
    plan: Plan, nodes: dict[str, str], model: moeshard.Model, full: str
) -> None:
    """The whole model goes on from exactly the text that was there."""
    line = Relay(nodes["de"])
    running, _ = gateway(plan, {**nodes, "de": line.url}, full, settings=Settings(resume=True))
    line.fault = "cut"
    prompt = held_out("de", 400, 1500)
    try:
        body = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
            assert answer.headers["x-moeshard-node"] == "de"
    finally:
        running.stop()
        line.stop()
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    moved = chunks[-1]["moeshard"]["moved"]
    assert moved["from"] == "de" and 0 < moved["after"] < 60
    # A chunk of it is a token.
    begun = "".join(chunk["choices"][0]["text"] for chunk in chunks[: moved["after"]])
    tokens = [*model.tokenize(prompt), *model.tokenize(begun, special=False)]
    rest = model.generate(tokens, temperature=0, max_tokens=60 - moved["after"], ignore_end=True)
    assert text == begun + "".join(rest)


def test_where_only_the_whole_model_measures_and_is_lost(plan: Plan, nodes: dict[str, str], full: str) -> None:
    """Sessions that are known go on; new ones are not sent just anywhere."""
    line = Relay(full)
    running, found = gateway(plan, nodes, line.url)
    try:
        known = {"prompt": held_out("de", 400), "max_tokens": 1}
        assert post(running.url, known).headers["x-moeshard-node"] == "de"
        line.stop()
        end = time.monotonic() + 30
        while found.backends[0].fault is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert post(running.url, known).headers["x-moeshard-node"] == "de"
        refused = post(running.url, {**known, "prompt": held_out("de", 400, 900)})
        assert refused.status_code == 503 and "Nobody but full can say" in refused.json()["error"]["message"]
    finally:
        running.stop()


def test_where_nobody_measures_sessions_are_spread_by_their_key(plan: Plan, nodes: dict[str, str]) -> None:
    line = Relay(nodes["de"])
    running, found = gateway(plan, {**nodes, "de": line.url}, None)
    try:
        assert not found.measures and "llama-server cannot" in found.placing()
        sessions = [f"session {n}" for n in range(30)]

        def place(url: str, session: str) -> tuple[str, str, bool]:
            answer = post(url, {"prompt": "Hi", "max_tokens": 1}, x_session_id=session)
            assert answer.status_code == 200, answer.text
            return (answer.headers["x-moeshard-node"], answer.headers["x-moeshard-reason"],
                    "x-moeshard-fit" in answer.headers)  # fmt: skip

        first = [place(running.url, session) for session in sessions]
        assert {reason for _, reason, _ in first} == {"hashed"} and not any(fit for _, _, fit in first)
        assert {node for node, _, _ in first} == set(DOMAINS)
        other, _ = gateway(plan, nodes, None)
        try:
            assert [place(other.url, session) for session in sessions] == first
        finally:
            other.stop()
        # No other node is known to be as good.
        lost = next(session for session, (node, _, _) in zip(sessions, first, strict=True) if node == "de")
        line.stop()
        end = time.monotonic() + 30
        while found.backends[0].fault is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        answer = post(running.url, {"prompt": "Hi", "max_tokens": 1}, x_session_id=lost)
        assert answer.status_code == 503 and "de cannot answer now" in answer.json()["error"]["message"]
    finally:
        running.stop()
