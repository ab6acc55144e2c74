"""The server over workers: answers are those of one machine, and it goes on when a lost worker is back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from worker_process import Start

from moeshard import Model

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from running import Running

from moeshard.serving import engine
from moeshard.serving.app import build
from moeshard.serving.local import LocalOptions, serve_locally
from moeshard.serving.placer import Placer
from moeshard.serving.settings import Settings

BODY: dict[str, Any] = {"prompt": "The river", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def test_a_lost_worker_is_an_error_until_it_is_back(
    start: Start, tinymoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RETRY_SECONDS", 0.5)
    workers = [start(), start()]
    model = Model(tinymoe, rpc=[worker.endpoint for worker in workers], n_threads=1, n_ctx=512)
    local = serve_locally(model, None, LocalOptions(n_slots=2, n_ctx=512))
    running = Running(lambda: build("tinymoe", Placer([], None), local.backends, Settings(), model, local.inner))
    try:
        url = f"{running.url}/v1/completions"
        wanted = "".join(
            Model(tinymoe, n_threads=1).generate("The river", max_tokens=24, temperature=0, ignore_end=True)
        )
        assert httpx.post(url, json=BODY, timeout=60).json()["choices"][0]["text"] == wanted
        workers[1].kill()
        lost = httpx.post(url, json=BODY, timeout=60)
        assert lost.status_code in (500, 503) and workers[1].endpoint in lost.json()["error"]["message"]
        assert httpx.get(f"{running.url}/health").status_code == 503
        start(port=workers[1].port)
        deadline = time.monotonic() + 60
        while httpx.get(f"{running.url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert httpx.post(url, json=BODY, timeout=60).json()["choices"][0]["text"] == wanted
    finally:
        running.stop()
        model.close()
