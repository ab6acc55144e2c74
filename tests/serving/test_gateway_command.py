"""`moeshard gateway` as a command: what it says, and what it refuses to begin with."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest
from command_line import Cli
from gateways import serve
from processes import Process, free_port

import moeshard
from moeshard import Plan


@pytest.fixture
def plan_file(plan: Plan, tmp_path: Path) -> Path:
    plan.write(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_it_begins_with_nodes_that_are_down_and_says_so(plan_file: Path) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(3)]
    nodes = [f"--node={name}={url}" for name, url in zip(("de", "en", "py"), urls, strict=True)]
    process = Process("gateway", "--plan", plan_file, *nodes, "--poll", "0.2")
    try:
        assert "serves tinymoe: 3 nodes (de, en, py); each node tells" in process.said
        for name, url in zip(("de", "en", "py"), urls, strict=True):
            assert f"{name} is down: {name} cannot be reached: " in process.warned and f"({url})" in process.warned
        assert "nobody holds the whole model" in process.warned
        health = httpx.get(f"{process.url}/health")
        assert health.status_code == 503 and "cannot be reached" in health.json()["error"]["message"]
        told = httpx.post(f"{process.url}/v1/completions", json={"prompt": "a"})
        assert told.status_code == 503 and told.json()["error"]["code"] == "node_down"
        assert [model["id"] for model in httpx.get(f"{process.url}/v1/models").json()["data"]] == [
            "tinymoe", "tinymoe@de", "tinymoe@en", "tinymoe@py",
        ]  # fmt: skip
        process.send(signal.SIGTERM)
        assert process.process.wait(60) == 0
    finally:
        process.close()


def test_what_is_wrong_is_said(
    cli: Cli, plan_file: Path, plan: Plan, model: moeshard.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    nodes = [f"--node={name}={nobody}" for name in ("de", "en", "py")]
    assert cli("gateway", "--plan", plan_file).code == 2
    assert cli("gateway", "--plan", plan_file, "--node", "de").code == 2
    assert "given twice" in cli("gateway", "--plan", plan_file, *nodes, nodes[0]).err
    done = cli("gateway", "--plan", plan_file, *nodes[:2])
    assert done.code == 1 and "give --node py=URL" in done.err
    done = cli("gateway", "--plan", plan_file, *nodes, "--full", "localhost:8080")
    assert done.code == 1 and "--full: 'localhost:8080' is no URL" in done.err
    done = cli("gateway", "--plan", tmp_path / "nothing.json", *nodes)
    assert done.code == 1 and "nothing.json" in done.err
    (tmp_path / "keys").write_text("a b c")
    done = cli("gateway", "--plan", plan_file, *nodes, "--node-key-file", tmp_path / "keys")
    assert done.code == 1 and "line 1 of the node keys" in done.err
    assert cli("gateway", "--plan", plan_file, *nodes, "--node-key-file", tmp_path / "none").code == 1
    monkeypatch.setenv("MOESHARD_NODE_API_KEY", "secret")
    whole = serve(model)
    try:
        done = cli("gateway", "--plan", plan_file, *nodes[1:], f"--node=de={whole.url}", "--port", "0")
        assert done.code == 1 and f"--node de: {whole.url}: it holds other experts" in done.err
    finally:
        whole.stop()
