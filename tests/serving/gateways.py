"""Nodes of a plan as servers of their own, in threads of the tests, and gateways before them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from running import Running

import moeshard
from moeshard import Plan
from moeshard.placement.meter import Limits
from moeshard.serving.app import build
from moeshard.serving.auth import Keys
from moeshard.serving.gateway import Gateway, connect
from moeshard.serving.local import LocalOptions, serve_locally
from moeshard.serving.placer import Placer
from moeshard.serving.remote import Deadlines
from moeshard.serving.settings import Settings

QUICK = Deadlines(connect=5.0, first=60.0, between=30.0, total=100.0, poll=0.2, health=10.0)


def serve(
    model: moeshard.Model, plan: Plan | None = None, keys: Keys | None = None, port: int = 0, **options: Any
) -> Running:
    """Serve a model, or a shard."""
    wanted = LocalOptions(**{"n_slots": 2, "n_ctx": 2048, "n_probe": 64, **options})
    local = serve_locally(model, plan, wanted)
    placer = Placer([node.name for node in plan.nodes] if plan else [], local.prober)
    name = Path(model.path).stem
    settings = Settings(keys=keys or Keys(()))
    return Running(lambda: build(name, placer, local.backends, settings, model, local.inner), port)


def gateway(
    plan: Plan,
    nodes: Mapping[str, str],
    full: str | None,
    *,
    settings: Settings | None = None,
    node_keys: Mapping[str, str] | None = None,
    deadlines: Deadlines = QUICK,
    n_waiting: int = 8,
    survey: bool = True,
    limits: Mapping[str, Limits] | None = None,
) -> tuple[Running, Gateway]:
    """Begin a gateway."""
    own = settings or Settings()
    found = connect(
        plan, nodes, full, keys=node_keys or {}, n_waiting=n_waiting, deadlines=deadlines,
        share_cache=len(own.keys) < 2,
    )  # fmt: skip
    if survey:
        asyncio.run(found.survey())
    placer = Placer([node.name for node in plan.nodes], found.prober, limits=limits)
    return Running(lambda: build("tinymoe", placer, found.backends, own)), found


def post(url: str, body: Mapping[str, Any], key: str = "", path: str = "/v1/completions", **headers: str) -> Any:
    """Ask, and return the answer."""
    own = {
        **({"authorization": f"Bearer {key}"} if key else {}),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    return httpx.post(f"{url}{path}", json=body, headers=own, timeout=120)
