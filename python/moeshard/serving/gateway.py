"""A gateway: the nodes of a plan and the whole model, each a server of its own, behind one application."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from moeshard._core import MoeshardError
from moeshard.planning.plan import Plan
from moeshard.serving.about import differs, not_whole
from moeshard.serving.backends import FULL
from moeshard.serving.remote import LLAMA_SERVER, MOESHARD, Deadlines, RemoteBackend
from moeshard.serving.remote_probing import RemoteProber


@dataclass(frozen=True, eq=False)
class Gateway:
    """What a gateway's application is built from."""

    backends: list[RemoteBackend]
    """The whole model first, if somebody has it, then the nodes in the order of the plan."""
    prober: RemoteProber

    @property
    def full(self) -> RemoteBackend | None:
        return next((one for one in self.backends if one.name == FULL), None)

    async def survey(self) -> None:
        """Look at all of them once, before anything is served.

        Raises:
            MoeshardError: one is not what the plan says.
        """
        await asyncio.gather(*(backend.survey() for backend in self.backends))

    def placing(self) -> str:
        """Say how sessions will be placed, as things look now."""
        nodes = [one for one in self.backends if one.name != FULL]
        full = self.full
        if full is not None and full.kind == MOESHARD and full.about.get("nodes"):
            return "sessions are placed by the server of the whole model"
        if all(one.kind in (MOESHARD, "") for one in nodes):
            how = "each node tells what a session's first turn costs it"
            return how if full is not None and full.kind == MOESHARD else f"{how}, and none is refused for its quality"
        others = " and ".join(one.name for one in nodes if one.kind == LLAMA_SERVER)
        return (
            f"nobody here measures where a session belongs ({others}: llama-server cannot), so sessions go to nodes by "
            f"hash, whatever they are about; let --full be a moeshard serve MODEL --plan"
        )

    @property
    def measures(self) -> bool:
        """Whether sessions are placed by what they are about, as things look now."""
        return not self.placing().startswith("nobody")


def connect(
    plan: Plan,
    nodes: Mapping[str, str],
    full: str | None,
    *,
    keys: Mapping[str, str],
    n_waiting: int,
    deadlines: Deadlines,
    share_cache: bool,
) -> Gateway:
    """Make a gateway; nothing is asked yet.

    Args:
        plan: what the nodes hold.
        nodes: where each node of the plan is: an URL by its name.
        full: where the whole model is; None: nowhere.
        keys: API keys of nodes, and of `FULL`, by name; the one of ``""`` is that of all others.
        n_waiting: requests that may wait for each of them here.
        deadlines: how long they have.
        share_cache: see `RemoteBackend`.

    Raises:
        MoeshardError: a name or an URL is wrong.
    """
    names = [node.name for node in plan.nodes]
    for name in nodes:
        if name not in names:
            raise MoeshardError(f"--node {name}: the plan has no such node; it has {', '.join(names)}")
    missing = [name for name in names if name not in nodes]
    if missing:
        raise MoeshardError(f"where is node {missing[0]} of the plan? give --node {missing[0]}=URL")

    def backend(name: str, url: str) -> RemoteBackend:
        node = next((node for node in plan.nodes if node.name == name), None)
        check = partial(not_whole, plan=plan) if node is None else partial(differs, plan=plan, node=node)
        return RemoteBackend(
            name,
            _base(name, url),
            check,
            key=keys.get(name, keys.get("", "")),
            n_waiting=n_waiting,
            deadlines=deadlines,
            share_cache=share_cache,
        )

    own = [backend(name, nodes[name]) for name in names]
    whole = None if full is None else backend(FULL, full)
    for node in own:
        node.renderer = whole
    return Gateway([*([whole] if whole else []), *own], RemoteProber(own, whole, deadlines.first))


def _base(name: str, url: str) -> str:
    """Check an URL; a trailing slash and /v1, as OpenAI's clients want it, are taken off."""
    where = f"--{FULL}" if name == FULL else f"--node {name}"
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_right = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
        raise MoeshardError(f"{where}: '{url}' is no URL such as http://127.0.0.1:8081")
    if parts.username is not None or parts.query or parts.fragment:
        raise MoeshardError(f"{where}: an URL holds no keys here; give the node's API key with --node-key-file")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def read_node_keys(text: str, names: Mapping[str, object]) -> dict[str, str]:
    """Read API keys of nodes: a line ``NAME KEY`` for one, or ``KEY`` for all others; '#' begins a comment.

    Raises:
        MoeshardError: a line holds something else, or names no node.
    """
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name = words[0] if len(words) == 2 else ""
        if len(words) > 2 or (name and name not in names and name != FULL):
            raise MoeshardError(
                f"line {number} of the node keys: write KEY, or NAME KEY with the name of a node or full"
            )
        keys[name] = words[-1]
    return keys
