"""The embedded model, a plan of it, and a server of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateways import serve
from running import Running
from served import DOMAINS, Application
from starlette.applications import Starlette

import moeshard
from moeshard import GGUFMap, Plan, PlanNode
from moeshard.gguf.identity import identify
from moeshard.placement.meter import Limits
from moeshard.planning.strategies import best
from moeshard.serving.app import build
from moeshard.serving.local import Local, LocalOptions, serve_locally
from moeshard.serving.placer import Placer
from moeshard.serving.settings import Settings
from moeshard.traffic.domains import Domain
from moeshard.traffic.embedded import embedded_text


@pytest.fixture(scope="session")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="session")
def plan(model: moeshard.Model, tinymoe: Path) -> Plan:
    """A node for each domain, with the best half for it."""
    from moeshard.profile.measure import analyze

    texts = [Domain(name, (embedded_text(name, "calibration"),)) for name in DOMAINS]
    profile = analyze(model, texts, n_tokens=1024, window=128)
    nodes = []
    for name in DOMAINS:
        keep = np.ones((model.n_layer, model.n_expert), dtype=bool)
        keep[profile.layers] = best(profile.total("saliency", [name]), model.n_expert // 2)
        nodes.append(PlanNode(name, keep))
    return Plan(nodes, "by domain", {}, replace(identify(GGUFMap(tinymoe)), facts={"path": "tinymoe"}))


@pytest.fixture(scope="session")
def shards(plan: Plan, tinymoe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each node of the plan."""
    folder = tmp_path_factory.mktemp("shards")
    moeshard.split(tinymoe, plan, folder)
    return {node.name: folder / f"tinymoe.{node.name}.gguf" for node in plan.nodes}


@pytest.fixture(scope="session")
def application(model: moeshard.Model, plan: Plan) -> Application:
    """Return what makes an application for the model and its plan (or none), and shows its engine."""

    def make(
        with_plan: bool = True,
        settings: Settings | None = None,
        limits: Mapping[str, Limits] | None = None,
        **options: Any,
    ) -> tuple[Starlette, Local]:
        wanted = LocalOptions(**{"n_slots": 4, "n_ctx": 2048, "n_probe": 64, **options})
        local = serve_locally(model, plan if with_plan else None, wanted)
        placer = Placer([node.name for node in plan.nodes] if with_plan else [], local.prober, limits=limits)
        return build("tinymoe", placer, local.backends, settings or Settings(), model, local.inner), local

    return make


@pytest.fixture(scope="session")
def server(application: Application) -> Iterator[Running]:
    running = Running(lambda: application()[0])
    yield running
    running.stop()


@pytest.fixture(scope="module")
def full(model: moeshard.Model, plan: Plan) -> Iterator[str]:
    """Where the whole model's server is, which places for gateways."""
    running = serve(model, plan)
    yield running.url
    running.stop()
