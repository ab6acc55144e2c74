"""What a session's first turn costs nodes that are elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from moeshard._core import MoeshardError
from moeshard.arrays import Doubles
from moeshard.serving.errors import ApiError, unavailable
from moeshard.serving.losses import losses_from_json
from moeshard.serving.node_errors import NodeError
from moeshard.serving.placer import Losses
from moeshard.serving.protocol import Prompt, prompt_json
from moeshard.serving.remote import LLAMA_SERVER, MOESHARD, RemoteBackend

_log = logging.getLogger("moeshard.serving")


class RemoteProber:
    """Asks who can tell: the whole model, which computes all nodes of the plan at once, or else every node for itself.

    All replicas of a gateway ask the same ones and get the same answer, as long as these are up.
    """

    def __init__(self, nodes: Sequence[RemoteBackend], full: RemoteBackend | None, seconds: float):
        """Ask the nodes of a plan, in its order, and the server of the whole model, for so long."""
        self._nodes, self._full, self._seconds = nodes, full, seconds

    async def losses(self, prompt: Prompt) -> Losses | None:
        """Predict a prompt; see `Prober`.

        Raises:
            ApiError: those who could tell are down.
        """
        full = self._full
        wanted = [node.name for node in self._nodes]
        if full is not None and _can_measure(full) and _knows(full, wanted):
            try:
                return _in_order(await self._of(full, prompt), full, wanted)
            except NodeError as error:
                _log.warning("the whole model could not tell where a session belongs: %s", error.message)
        if all(node.kind != LLAMA_SERVER for node in self._nodes):
            return await self._of_each(prompt, full)
        if full is not None and (not full.kind or _knows(full, wanted)):
            why = full.fault or "it failed"
            raise unavailable(f"Nobody but {full.name} can say where this session belongs: {why}.", "node_down")
        return None

    async def _of_each(self, prompt: Prompt, full: RemoteBackend | None) -> Losses | None:
        able = [node for node in self._nodes if _can_measure(node)]
        if not able:
            return None  # whoever it is that should have it, somebody else has to
        asked = [*able, *([full] if full is not None and _can_measure(full) else [])]
        found = await asyncio.gather(*(self._of(one, prompt) for one in asked), return_exceptions=True)
        told: dict[str, Losses] = {}
        for one, losses in zip(asked, found, strict=True):
            if isinstance(losses, Losses):
                told[one.name] = losses
            elif not isinstance(losses, NodeError):
                raise losses
        names = tuple(node.name for node in able if node.name in told)
        if not names:
            raise unavailable("Nobody can say now where this session belongs: all nodes failed.", "node_down")
        lengths = {losses.n_tokens for losses in told.values()}
        if len(lengths) > 1:
            raise ApiError(
                502, "The nodes look at different numbers of tokens; start all of them with the same --probe.",
                kind="server_error", code="node_failed",
            )  # fmt: skip
        own = np.stack([_own(told[node.name], node) for node in able if node.name in told])
        whole = _own(told[full.name], full) if full is not None and full.name in told else None
        first = told[names[0]]
        return Losses(own, whole, n_tokens=first.n_tokens, n_cut=first.n_cut, names=names)

    async def _of(self, one: RemoteBackend, prompt: Prompt) -> Losses:
        told = await one.ask("/moeshard/losses", prompt_json(prompt), self._seconds)
        try:
            return losses_from_json(told, len(_names(one)))
        except MoeshardError as error:
            raise NodeError("answer", f"{one.name}: {error}", 502) from error


def _names(one: RemoteBackend) -> Mapping[str, object]:
    return one.about.get("nodes") or {}


def _own(losses: Losses, one: RemoteBackend) -> Doubles:
    """Return what a server's losses say of the node that it is, which may be one of several that it computes."""
    assert losses.full is not None
    names = list(_names(one))
    return losses.nodes[names.index(one.name)] if one.name in names else losses.full


def _can_measure(one: RemoteBackend) -> bool:
    return one.kind == MOESHARD and one.fault is None


def _knows(full: RemoteBackend, names: Sequence[str]) -> bool:
    return set(names) <= set(_names(full))


def _in_order(losses: Losses, full: RemoteBackend, wanted: Sequence[str]) -> Losses:
    order = list(_names(full))
    rows = losses.nodes[[order.index(name) for name in wanted]]
    return Losses(rows, losses.full, n_tokens=losses.n_tokens, n_cut=losses.n_cut)
