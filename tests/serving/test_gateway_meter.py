"""What nodes miss, as their gateway knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import gateway, post, serve
from served import DOMAINS, held_out

import moeshard
from moeshard import Plan
from moeshard.placement.meter import Limits


@pytest.fixture(scope="module")
def metered(plan: Plan, tinymoe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, moeshard.Model]:
    """Shards that can say what they miss."""
    folder = tmp_path_factory.mktemp("metered")
    moeshard.split(tinymoe, plan, folder, with_router=True)
    return {name: moeshard.Model(folder / f"tinymoe.{name}.gguf", n_threads=1) for name in DOMAINS}


def test_what_a_node_misses_is_passed_on(plan: Plan, metered: dict[str, moeshard.Model]) -> None:
    nodes = {name: serve(model) for name, model in metered.items()}
    alone = serve(metered["de"])  # with nothing of the prompt in its memory
    running, _ = gateway(plan, {name: node.url for name, node in nodes.items()}, None)
    try:
        body = {"prompt": held_out("en", 200), "max_tokens": 8, "seed": 1}
        own = post(alone.url, {**body, "model": "tinymoe.de"}).json()["moeshard"]
        through = post(running.url, {**body, "model": "tinymoe@de"}).json()["moeshard"]
        assert 0 < own["missed"] == through["missed"] < 1
        assert 'missed_mass_count{model_name="tinymoe",node="de"} 1.0' in httpx.get(f"{running.url}/metrics").text
    finally:
        for server in (running, alone, *nodes.values()):
            server.stop()


def test_a_session_whose_answer_missed_much_is_placed_again(
    plan: Plan, model: moeshard.Model, metered: dict[str, moeshard.Model]
) -> None:
    """A gateway cannot move an answer while it is written: the session's next turn goes elsewhere."""
    nodes = {name: serve(model) for name, model in metered.items()}
    full = serve(model, plan)
    limits = dict.fromkeys(DOMAINS, Limits(reference=0.4, threshold=1.0))
    running, _ = gateway(plan, {name: node.url for name, node in nodes.items()}, full.url, limits=limits)

    def say(session: str, prompt: str) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": 4, "seed": 1}
        told: dict[str, Any] = post(running.url, body, x_session_id=session).json()["moeshard"]
        return told

    try:
        german, code = held_out("de", 300), held_out("py", 900, 8000)
        for session, then in (("changes", code), ("stays", held_out("de", 900, 300))):
            assert say(session, german)["node"] == "de"
            second = say(session, f"{german}\n\n{then}")
            assert second["node"] == "de" and (second["missed"] > 0.4) == (session == "changes")
            third = say(session, f"{german}\n\n{then}")
            assert (third["reason"] == "moved") == (third["node"] != "de") == (session == "changes")
            assert say(session, f"{german}\n\n{then}")["node"] == third["node"]
        assert 'replacements_total{model_name="tinymoe",node=' in httpx.get(f"{running.url}/metrics").text
    finally:
        for server in (running, full, *nodes.values()):
            server.stop()
