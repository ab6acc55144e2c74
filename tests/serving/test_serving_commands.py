"""`moeshard serve` and `moeshard chat`, as processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command_line import Cli
from conftest import held_out

import moeshard
from moeshard import Plan

SERVE = [sys.executable, "-m", "moeshard", "serve", "tinymoe", "--port", "0", "--threads", "1", "--ctx", "2048"]


@pytest.fixture
def plan_file(plan: Plan, tmp_path: Path) -> Path:
    plan.write(tmp_path / "plan.json")
    return tmp_path / "plan.json"


class Process:
    def __init__(self, *arguments: str | Path):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MOESHARD_API_KEY": ""}
        self.process = subprocess.Popen(
            [*SERVE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        match = re.match(r"(http://\S+) serves tinymoe: ", self.said)
        assert match is not None, (self.said, self.process.communicate())
        self.url = match[1]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def serving(plan_file: Path) -> Iterator[Process]:
    process = Process("--plan", plan_file)
    yield process
    process.close()


def test_it_says_what_it_serves_and_finishes_what_it_began(serving: Process) -> None:
    assert "3 nodes (de, en, py) and the whole model, 4 requests at once of 2048 tokens" in serving.said
    assert serving.process.stdout is not None
    assert f"base_url {serving.url}/v1" in serving.process.stdout.readline()
    assert httpx.get(f"{serving.url}/health").json() == {"status": "ok"}
    # Another site's page that made its name mean this machine.
    assert httpx.get(f"{serving.url}/v1/models", headers={"host": "evil.example"}).status_code == 403
    body = {"prompt": held_out("de"), "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{serving.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        serving.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert answer.headers["x-moeshard-node"] == "de" and rest[-1] == "data: [DONE]"
    assert serving.process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{serving.url}/health")


def test_interrupted_it_ends(plan_file: Path) -> None:
    process = Process()
    try:
        assert "serves tinymoe: the whole model, 4 requests" in process.said
        assert process.end(signal.SIGINT) == 0
    finally:
        process.close()


def test_what_is_wrong_is_said_before_anything_is_loaded(cli: Cli, tmp_path: Path) -> None:
    assert cli("serve", "tinymoe", "--metrics", "all").code == 2
    done = cli("serve", "tinymoe", "--host", "203.0.113.7", "--port", "0")
    assert done.code == 1 and "cannot listen on 203.0.113.7" in done.err
    done = cli("serve", "tinymoe", "--port", "0", "--api-key-file", tmp_path / "nothing")
    assert done.code == 1 and "cannot read the API keys" in done.err


def test_the_missing_extra_is_named(tmp_path: Path) -> None:
    """In an environment without it, as after `pip install moeshard`."""
    script = (
        "import sys, importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'uvicorn' else found(name, *rest)\n"
        "sys.argv = ['moeshard', 'serve', 'tinymoe']\n"
        "from moeshard.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "serving needs uvicorn: pip install 'moeshard[serve]'" in done.stderr


def chat(text: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeshard", "chat", "tinymoe", "--threads", "1", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_a_chat_from_a_pipe(plan_file: Path, model: moeshard.Model, plan: Plan) -> None:
    german = held_out("de").replace("\n", " ")
    done = chat(f"{german}\n\n/help\n/reset\n{german}\n/quit\nnever\n", "--plan", plan_file, "-n", "8", "--seed", "3")
    assert done.returncode == 0
    keep = next(node.keep for node in plan.nodes if node.name == "de")
    prompt = f"user: {german}\nassistant:"
    wanted = "".join(model.generate(prompt, keep, max_tokens=8, seed=3, stop=["\nuser:", "\nsystem:", "\nassistant:"]))
    assert done.stdout.startswith(wanted.removesuffix("\n") + "\n")
    assert done.stderr.count("[de: de predicts the prompt best") == 2 and "/reset begins anew" in done.stderr


def test_a_chat_with_some_experts(model: moeshard.Model) -> None:
    done = chat("Hello\nAnd?\n", "--keep", "0-63", "-n", "5", "--temperature", "0", "--system", "Be brief.")
    prompt = "system: Be brief.\nuser: Hello\nassistant:"
    keep = model.keep("0-63")
    wanted = "".join(model.generate(prompt, keep, max_tokens=5, temperature=0, stop=["\nuser:", "\nassistant:"]))
    assert done.returncode == 0 and done.stdout.startswith(wanted.removesuffix("\n") + "\n") and done.stderr == ""
    both = chat("a\n", "--keep", "0-63", "--plan", "p.json")
    assert both.returncode == 2 and "leave out --keep" in both.stderr


def test_a_context_that_is_full_is_said_and_the_chat_goes_on() -> None:
    done = chat(f"{'many words ' * 400}\nHello\n", "--ctx", "256", "-n", "3")
    assert done.returncode == 0 and "maximum context length is 256" in done.stderr and done.stdout.strip()


def test_ctrl_c_ends_an_answer_and_not_the_chat() -> None:
    # The likeliest tokens of the embedded model go round in circles: the answer would fill the context.
    command = [sys.executable, "-m", "moeshard", "chat", "tinymoe", "--threads", "1", "--ctx", "8192"]
    process = subprocess.Popen(
        [*command, "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Tell me about Debian\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/reset\n/quit\n", timeout=60)
        assert process.returncode == 0 and b"[stopped]" in err and len(out) < 8192
    finally:
        process.kill()


def test_the_way_out_is_learned_by_an_evaluation(plan_file: Path, cli: Cli, tmp_path: Path) -> None:
    found = tmp_path / "eval.json"
    texts = [option for name in ("de", "en", "py") for option in ("--text", f"{name}={tmp_path / name}.txt")]
    for name in ("de", "en", "py"):
        (tmp_path / f"{name}.txt").write_text(held_out(name, 6000))
    options = ("--windows", "6", "--window", "96", "--prompt", "32", "--generate", "0", "--threads", "1")
    said = cli("evaluate", "tinymoe", "--plan", plan_file, *texts, *options, "-o", found)
    assert said.code == 0, said.err
    assert "When to look at sessions again was learned for" in said.out.replace("\n", " ")
    alarms = moeshard.read_evaluation(found).alarms
    assert alarms is not None and alarms.limits()
    process = Process("--plan", plan_file, "--evaluation", found)
    try:
        assert httpx.get(f"{process.url}/health").status_code == 200
    finally:
        process.close()
    other = moeshard.read_plan(plan_file)
    other.nodes.reverse()
    other.write(tmp_path / "other.json")
    for arguments, message in (
        (("--plan", tmp_path / "other.json", "--evaluation", found), "is of another plan"),
        (("--evaluation", found), "give --plan too"),
        (("--plan", plan_file, "--evaluation", plan_file), "it is no evaluation"),
    ):
        refused = cli("serve", "tinymoe", *arguments, "--port", "0", "--threads", "1")
        assert refused.code in (1, 2) and message in refused.err, refused.err
