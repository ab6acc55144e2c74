"""Real processes, killed and stopped: a client gets a whole answer or an error, never a silent cut, and soon."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import held_out
from processes import Process

from moeshard import Plan

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# No answer here takes long by itself; what takes longer than this hangs.
PATIENCE = 60.0
LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True, "stream": True, "seed": 1}
# One for all: each new one would read the certificates of the system first.
CLIENT = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plan_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chaos") / "plan.json"
    plan.write(path)
    return path


class House:
    """A gateway, the server of the whole model and a process for two of the nodes."""

    def __init__(self, plan_file: Path, shards: dict[str, Path]):
        options = ("--threads", "1", "--ctx", "2048", "--parallel", "2")
        self.full = Process("serve", "tinymoe", "--plan", plan_file, *options, "--probe", "64")
        self.de, self.en = (Process("serve", shards[name], *options) for name in ("de", "en"))
        nodes = [f"--node=de={self.de.url}", f"--node=en={self.en.url}", f"--node=py={self.full.url}"]
        self.gateway = Process(
            "gateway", "--plan", plan_file, *nodes, "--full", self.full.url, "--poll", "0.3",
            "--health-timeout", "1.5", "--first-timeout", "20", "--chunk-timeout", "10",
        )  # fmt: skip
        self._n_turns = 0
        self._timers: list[threading.Timer] = []

    def processes(self) -> list[Process]:
        return [self.gateway, self.de, self.en, self.full]

    def close(self) -> None:
        for process in self.processes():
            process.close()

    def turn(self, domain: str) -> str:
        """Return a first turn that no session had, and that clearly belongs on a domain's node."""
        while True:
            self._n_turns += 1
            text = held_out(domain, 300, 40 * self._n_turns)
            told = whole(self.full.url, text, max_tokens=1).headers
            if (told["x-moeshard-node"], told["x-moeshard-reason"]) == (domain, "placed"):
                return text

    def later(self, seconds: float, process: Process, number: int) -> None:
        """Send a signal after a while."""
        timer = threading.Timer(seconds, process.send, (number,))
        self._timers.append(timer)
        timer.start()

    def lose_soon(self, process: Process, number: int) -> None:
        """Let a process take what it is sent from now on, say nothing to it, and be lost."""
        process.send(STOP)
        if number == KILL:
            self.later(0.5, process, KILL)

    def mend(self) -> None:
        """Begin again what was killed, and let go on what was stopped."""
        while self._timers:
            self._timers.pop().join()
        for process in self.processes():
            process.send(signal.SIGCONT)
            if process.process.poll() is not None:
                process.begin_again()
        end = time.monotonic() + PATIENCE
        while CLIENT.get(f"{self.gateway.url}/health").json() != {"status": "ok"}:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def house(plan_file: Path, shards: dict[str, Path]) -> Iterator[House]:
    found = House(plan_file, shards)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def well(house: House) -> Iterator[None]:
    """Every test leaves the house with all up and nothing to do."""
    yield
    house.mend()
    end = time.monotonic() + PATIENCE
    for process in house.processes():
        while any(node["running"] or node["waiting"] for node in nodes(process)):
            assert time.monotonic() < end, "a slot is taken that nobody uses"
            time.sleep(0.02)


def nodes(process: Process) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = CLIENT.get(f"{process.url}/nodes").json()["data"]
    return found


def failovers(house: House, node: str) -> float:
    text = CLIENT.get(f"{house.gateway.url}/metrics").text
    name = f'moeshard:failovers_total{{model_name="tinymoe",node="{node}",reason='
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


class Answer:
    """A stream as a client reads it."""

    def __init__(self, response: httpx.Response):
        self.response = response
        self.lines = (line for line in response.iter_lines() if line and not line.startswith(":"))
        self.text = ""
        self.last: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
        self.done = False

    @property
    def node(self) -> str:
        return self.response.headers["x-moeshard-node"]

    def read(self, n: int = 1_000_000) -> Answer:
        for line in self.lines:
            if line == "data: [DONE]":
                assert self.error is None
                self.done = True
                break
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                self.error = chunk["error"]
                assert next(self.lines, None) is None  # nothing comes after it
                break
            self.last = chunk
            self.text += chunk["choices"][0]["text"]
            n -= 1
            if n == 0:
                break
        return self


@contextmanager
def ask(url: str, prompt: str, **more: Any) -> Iterator[Answer]:
    headers = {name.replace("_", "-"): more.pop(name) for name in list(more) if name.startswith("x_")}
    body = {"prompt": prompt, **LONG, **more}
    with CLIENT.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
        yield Answer(response)


def whole(url: str, prompt: str, **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 8, **more}
    return CLIENT.post(f"{url}/v1/completions", json=body)


both = pytest.mark.parametrize("number", [pytest.param(KILL, id="killed"), pytest.param(STOP, id="stopped")])


@both
@pytest.mark.parametrize("stream", [True, False])
def test_a_node_is_lost_before_its_first_token(house: House, number: int, stream: bool) -> None:
    """The whole model answers, and the session stays there."""
    prompt = house.turn("de")
    assert whole(house.gateway.url, prompt).headers["x-moeshard-node"] == "de"
    before = failovers(house, "de")
    house.lose_soon(house.de, number)
    if stream:
        with ask(house.gateway.url, prompt, max_tokens=40) as answer:
            answer.read()
        assert answer.done and answer.last["moeshard"]["reason"] == "down"
        assert answer.last["moeshard"]["node"] == "full" and "moved" not in answer.last["moeshard"]
    else:
        told = whole(house.gateway.url, prompt, max_tokens=40, ignore_eos=True)
        assert told.status_code == 200 and told.json()["usage"]["completion_tokens"] == 40
        assert told.headers["x-moeshard-node"] == "full" and told.headers["x-moeshard-reason"] == "down"
        assert "moved" not in told.json()["moeshard"]
    assert failovers(house, "de") == before + 1
    house.mend()
    # It stays there, though the node is back; others do not.
    assert whole(house.gateway.url, prompt).headers["x-moeshard-node"] == "full"
    assert whole(house.gateway.url, house.turn("de")).headers["x-moeshard-node"] == "de"


@both
def test_a_node_is_lost_in_the_middle(house: House, number: int) -> None:
    """The answer ends with an error, unless the client or the gateway wants it continued."""
    with ask(house.gateway.url, house.turn("de")) as answer:
        assert answer.read(3).text and answer.node == "de"
        house.de.send(number)
        answer.read()
    assert not answer.done and answer.error is not None
    assert answer.error["code"] in ("node_failed", "timeout") and "de " in answer.error["message"]


@both
def test_an_answer_is_continued_by_the_whole_model(house: House, number: int) -> None:
    with ask(house.gateway.url, house.turn("de"), max_tokens=600, x_moeshard_resume="1") as answer:
        begun = answer.read(3).text
        house.de.send(number)
        answer.read()
    assert answer.done and answer.error is None and answer.node == "de"  # when the headers went out
    told = answer.last["moeshard"]
    assert (told["node"], told["reason"], told["moved"]["from"]) == ("full", "down", "de")
    assert 0 < told["moved"]["after"] < 600 and len(answer.text) > len(begun) + 300
    assert answer.last["choices"][0]["finish_reason"] == "length"


@both
def test_a_node_is_lost_while_nobody_asks(house: House, number: int) -> None:
    known, new = house.turn("de"), house.turn("de")
    assert whole(house.gateway.url, known).headers["x-moeshard-node"] == "de"
    house.de.send(number)
    for prompt in (known, new):
        answer = whole(house.gateway.url, prompt)
        assert answer.status_code == 200
        assert (answer.headers["x-moeshard-node"], answer.headers["x-moeshard-reason"]) == ("full", "down")
    end = time.monotonic() + PATIENCE
    while (told := CLIENT.get(f"{house.gateway.url}/health")).json().get("down") != ["de"]:
        assert time.monotonic() < end
    assert told.status_code == 200


@both
def test_the_whole_model_is_lost_before_its_first_token(house: House, number: int) -> None:
    """What belongs there is answered by nobody, at once or with an error chunk; what belongs elsewhere is answered."""
    known = house.turn("de")
    assert whole(house.gateway.url, known).headers["x-moeshard-node"] == "de"
    assert whole(house.gateway.url, "Hi").headers["x-moeshard-node"] == "full"
    new = house.turn("de")
    house.lose_soon(house.full, number)
    told = whole(house.gateway.url, "Hi")
    assert told.status_code in (502, 503, 504) and told.json()["error"]["code"] in ("node_failed", "node_down")
    assert whole(house.gateway.url, known).headers["x-moeshard-node"] == "de"
    # Nodes tell for themselves where a new session belongs.
    told = whole(house.gateway.url, new)
    assert (told.headers["x-moeshard-node"], told.headers["x-moeshard-reason"]) == ("de", "placed")
    assert "x-moeshard-fit" not in told.headers


@both
def test_the_whole_model_is_lost_in_the_middle(house: House, number: int) -> None:
    with ask(house.gateway.url, "Hi", x_moeshard_resume="1") as answer:
        assert answer.read(3).text and answer.node == "full"
        house.full.send(number)
        answer.read()
    assert not answer.done and answer.error is not None  # nobody else holds everything


@both
def test_the_whole_model_is_lost_while_nobody_asks(house: House, number: int) -> None:
    new = house.turn("de")
    house.full.send(number)
    answer = whole(house.gateway.url, new)
    assert answer.status_code == 200 and answer.headers["x-moeshard-node"] == "de"
    told = whole(house.gateway.url, "Hello")  # as good anywhere
    assert told.status_code == 200 and told.headers["x-moeshard-node"] in ("de", "en")


@pytest.mark.parametrize("moment", ["before", "middle", "idle"])
def test_the_gateway_is_killed(house: House, moment: str) -> None:
    """The client's connection breaks at once, and nodes stop to compute for it (which the fixture waits for)."""
    if moment == "idle":
        house.gateway.send(KILL)
        with pytest.raises(httpx.TransportError):
            whole(house.gateway.url, "Hi")
        return
    if moment == "before":
        house.de.send(STOP)
        house.later(0.3, house.gateway, KILL)
    begin = time.monotonic()

    def read() -> None:
        with ask(house.gateway.url, held_out("de"), model="tinymoe@de") as answer:
            answer.read(3)
            house.gateway.send(KILL)
            answer.read()

    with pytest.raises(httpx.TransportError):
        read()
    assert time.monotonic() - begin < PATIENCE / 2


@pytest.mark.parametrize("moment", ["before", "middle", "idle"])
def test_the_gateway_is_stopped_for_a_while(house: House, moment: str) -> None:
    """Nobody is told anything meanwhile; afterwards answers are whole."""
    if moment != "middle":
        house.gateway.send(STOP)
        house.later(1.5, house.gateway, signal.SIGCONT)
    with ask(house.gateway.url, held_out("en"), max_tokens=200) as answer:
        if moment == "middle":
            answer.read(3)
            house.gateway.send(STOP)
            house.later(1.5, house.gateway, signal.SIGCONT)
        answer.read()
    assert answer.done or answer.error is not None
    assert answer.done, answer.error


def test_replicas_and_a_restarted_gateway_decide_alike(house: House) -> None:
    turns = [held_out(domain, 300, at) for domain in ("de", "en", "py", "fr") for at in (3000, 4000)]

    def place(prompt: str) -> tuple[str, str]:
        answer = whole(house.gateway.url, prompt, max_tokens=1)
        return answer.headers["x-moeshard-node"], answer.headers.get("x-moeshard-fit", "")

    before = [place(prompt) for prompt in turns]
    house.gateway.begin_again()
    assert [place(prompt) for prompt in reversed(turns)][::-1] == before


def test_two_hundred_clients_that_leave_take_nothing_with_them(house: House) -> None:
    """Before and after the first piece, several at once: no slot, descriptor or connection stays."""

    def leave(round_: int) -> None:
        body = {"prompt": held_out(("de", "en", "py")[round_ % 3], 200), **LONG}
        if round_ % 4 == 0:  # at once
            with pytest.raises(httpx.TimeoutException):
                CLIENT.post(f"{house.gateway.url}/v1/completions", json={**body, "stream": False}, timeout=0.05)
            return
        with CLIENT.stream("POST", f"{house.gateway.url}/v1/completions", json=body) as answer:
            assert answer.status_code in (200, 429)
            next(answer.iter_bytes())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(20)))  # what is made once, is made now
        before = settled(house)
        list(pool.map(leave, range(20, 220)))
    after = settled(house)
    assert all(n <= m + 2 for n, m in zip(after, before, strict=True)), (before, after)


def settled(house: House) -> list[int]:
    """Return how many descriptors each process has, once nothing runs and no connection is left to close."""
    end, found = time.monotonic() + PATIENCE, list[int]()
    while time.monotonic() < end:
        busy = any(node["running"] or node["waiting"] for process in house.processes() for node in nodes(process))
        now = [process.n_files for process in house.processes()]
        if not busy and now == found:
            break
        found = now
        time.sleep(0.5)
    return found
