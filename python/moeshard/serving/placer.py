"""Which backend has a session. Decided by plan and first turn alone, so that every replica decides alike, without
anything shared and after a restart too; what is remembered is a cache.

The exception is load: of nodes that are too close to call the session's key names one, and another that is much less
busy goes before it. Replicas that see other loads may differ there: it costs a prefix computed again, and no quality.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Protocol

from moeshard.arrays import Doubles
from moeshard.placement.decision import MIN_QUALITY, MIN_TOKENS, Placed, place_by_loss
from moeshard.placement.meter import Limits, place_again
from moeshard.serving.backends import FULL
from moeshard.serving.decision import Decision, Reason
from moeshard.serving.errors import ApiError, unavailable
from moeshard.serving.protocol import Message, Prompt, Request

HASHED = "nobody here measures where a session belongs, so its key names a node"

LOAD_GAP = 0.5
"""A node goes before the one that the session's key names where it has so many fewer requests for each slot."""
MAX_SESSIONS = 20_000
"""Some 2 KB each; one that was forgotten is placed anew."""
IDLE_SECONDS = 600.0
"""A session whose node was down goes back to it after so long without a request: its prefix is then somewhere else."""

SESSION_HEADERS = ("x-session-id", "x-openwebui-chat-id")


@dataclass(frozen=True, eq=False)
class Losses:
    """What predicting a first turn cost; see `place_by_loss`."""

    nodes: Doubles
    """(G, T), nats."""
    full: Doubles | None
    """(T,); None where nobody holds the whole model: no session is refused then."""
    n_tokens: int
    """Tokens that were looked at: T + 1, or fewer than `MIN_TOKENS`, for which nothing need be measured."""
    n_cut: int
    """Tokens before these that were not."""
    names: tuple[str, ...] | None = None
    """Of the nodes in `nodes`, where not all could be measured."""


class Prober(Protocol):
    """What measures losses."""

    async def losses(self, prompt: Prompt) -> Losses | None:
        """Predict a prompt on every node of the plan, in its order, and on the whole model.

        None where nobody here can measure that.
        """


@dataclass(frozen=True)
class State:
    """A backend as the decision sees it."""

    up: bool
    load: float
    """Requests for each slot."""


def choose(placed: Placed, key: str, states: Mapping[str, State]) -> Decision:
    """Choose who has a session. A pure function.

    Args:
        placed: what the probe found.
        key: of the session.
        states: of the nodes and of `FULL`, by name; who is not in it is not there.

    Raises:
        ApiError: 503, nobody who may have it is up.
    """
    full_is_up = FULL in states and states[FULL].up
    if placed.node is None:
        if not full_is_up:
            raise unavailable(f"No node serves this session well enough, and nobody who holds the whole model is up. "
                              f"{_sentence(placed.reason)}", "refused")  # fmt: skip
        short = placed.n_tokens < MIN_TOKENS
        return Decision(FULL, "short" if short else "refused", _sentence(placed.reason), 1.0)
    able = [name for name in placed.candidates if name in states and states[name].up]
    if able:
        able.sort(key=lambda name: _rank(key, name))
        quietest = min(able, key=lambda name: states[name].load)
        chosen = quietest if states[able[0]].load - states[quietest].load >= LOAD_GAP else able[0]
        reason: Reason = "placed" if len(placed.candidates) == 1 else "unclear"
        if placed.reason == HASHED:
            reason = "hashed"
        return Decision(chosen, reason, _sentence(placed.reason), _fit(placed, chosen))
    detail = f"{' and '.join(placed.candidates)} cannot answer now. {_sentence(placed.reason)}"
    if full_is_up:
        return Decision(FULL, "down", detail, 1.0)
    fits = {name: exp(-excess) for name, excess in (placed.excess or {}).items() if name in states and states[name].up}
    chosen = max(fits, key=fits.__getitem__, default="")
    if fits.get(chosen, 0) < MIN_QUALITY:
        raise unavailable(detail, "node_down")
    return Decision(chosen, "down", detail, _fit(placed, chosen))


def session_key(scope: str, model: str, headers: Mapping[str, str], request: Request) -> str:
    """Return what a session is known by: what the client calls it, else its model and first turn.

    Args:
        scope: who asks; two clients never share a session.
        model: of the request.
        headers: names in lower case.
        request: its `prompt_cache_key` goes after the header ``x-session-id`` and before ``x-openwebui-chat-id``.
    """
    own, webui = (headers.get(name) for name in SESSION_HEADERS)
    given = own or request.prompt_cache_key or webui
    told = ("id", given) if given else ("turn", model, *_as_text(first_turn(request.prompts[0])))
    digest = hashlib.sha256(scope.encode())
    for part in told:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def first_turn(prompt: Prompt) -> Prompt:
    """Return what a session is placed by: of a chat all up to the first message of the user, else the prompt."""
    if isinstance(prompt, str):
        return prompt
    turn: list[Message] = []
    for message in prompt:
        if not isinstance(message, Message):
            return prompt
        turn.append(message)
        if message.role == "user":
            break
    return tuple(turn)


@dataclass
class _Session:
    """What is remembered of one."""

    placed: Placed
    decision: Decision
    used: float
    """When it last was."""
    doubted: bool = False
    """Its last answer missed so much that its latest text is looked at before the next one."""


class Placer:
    """Places sessions, and remembers where."""

    def __init__(
        self,
        names: Sequence[str],
        prober: Prober | None,
        *,
        min_quality: float = MIN_QUALITY,
        limits: Mapping[str, Limits] | None = None,
    ):
        """Place on the nodes of these names, by what the prober measures; without one everything goes to `FULL`.

        Sessions whose prompt the best node predicts with a quality below `min_quality` are refused; see `Placement`.
        Where a node has `limits`, answers that pass them are placed again (`moeshard.serving.moving`).
        """
        self.names, self.prober, self.min_quality = list(names), prober, min_quality
        self.limits = dict(limits or {})
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._probing: dict[str, asyncio.Future[Placed]] = {}

    async def place(
        self,
        key: str,
        prompt: Prompt,
        states: Callable[[], Mapping[str, State]],
        probed: Callable[[float], None] = lambda seconds: None,
        left: Callable[[str, str], None] = lambda source, node: None,
    ) -> tuple[Decision, bool]:
        """Say who has a session.

        Args:
            key: see `session_key`.
            prompt: its first prompt, or a later one that begins with it.
            states: of nodes and whole model, asked when they are needed.
            probed: told how long a probe took.
            left: told where a session goes on that was doubted, and from where.

        Returns:
            The decision, and whether it was made now.
        """
        if self.prober is None:
            state = states().get(FULL)
            if state is None or not state.up:
                raise unavailable("The model cannot answer now.")
            return Decision(FULL, "only", "There are no nodes beside the whole model.", None), False
        known = self._sessions.get(key)
        if known is not None:
            idle, known.used = time.monotonic() - known.used, time.monotonic()
            self._sessions.move_to_end(key)
            state = states().get(known.decision.backend)
            stays = known.decision.reason != "down" or idle < IDLE_SECONDS
            if stays and state is not None and state.up:
                return await self._reconsider(key, known, prompt, states, probed, left)
            placed = known.placed
        else:
            placed = await self._probe_once(key, first_turn(prompt), self.prober, probed)
        return self._remember(key, placed, choose(placed, key, states())), True

    def doubt(self, key: str) -> None:
        """Take note that a session's answer missed much, and could not be moved: its next turn is placed again."""
        known = self._sessions.get(key)
        if known is not None:
            known.doubted = True

    async def _reconsider(
        self,
        key: str,
        known: _Session,
        prompt: Prompt,
        states: Callable[[], Mapping[str, State]],
        probed: Callable[[float], None],
        left: Callable[[str, str], None],
    ) -> tuple[Decision, bool]:
        """Place a session again by its latest text, if it is doubted; it stays where that is as good as any."""
        if not known.doubted or self.prober is None:
            return known.decision, False
        known.doubted = False
        losses = await _timed(self.prober, prompt, probed)
        source = known.decision.backend
        if losses is None or losses.full is None or losses.n_tokens < MIN_TOKENS:
            return known.decision, False
        names = self._measured(losses)
        placed = place_again(names, losses.nodes, losses.full, source, min_quality=self.min_quality)
        if placed is None:
            return known.decision, False
        decision = replace(choose(placed, key, states()), reason="moved")
        if decision.backend == source:
            return known.decision, False
        left(source, decision.backend)
        return self._remember(key, placed, decision), True

    def moved(self, key: str, placed: Placed, decision: Decision) -> None:
        """Take note that a session goes on elsewhere, by what its latest text told."""
        self._remember(key, placed, decision)

    def instead(self, key: str, failed: Collection[str], states: Mapping[str, State]) -> Decision | None:
        """Say who has a session now that some have failed it, though they may seem to be up; None: nobody."""
        known = self._sessions.get(key)
        if known is None:
            return None
        try:
            left = {name: State(False, 0.0) if name in failed else state for name, state in states.items()}
            return self._remember(key, known.placed, choose(known.placed, key, left))
        except ApiError:
            return None

    def _remember(self, key: str, placed: Placed, decision: Decision) -> Decision:
        self._sessions[key] = _Session(placed, decision, time.monotonic())
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return decision

    async def _probe_once(self, key: str, turn: Prompt, prober: Prober, probed: Callable[[float], None]) -> Placed:
        """Probe a session; requests of it that come meanwhile wait for the same result."""
        running = self._probing.get(key)
        if running is None:
            running = asyncio.ensure_future(self._probe(key, turn, prober, probed))
            self._probing[key] = running
            running.add_done_callback(lambda _: self._probing.pop(key, None))
        return await asyncio.shield(running)

    async def _probe(self, key: str, turn: Prompt, prober: Prober, probed: Callable[[float], None]) -> Placed:
        losses = await _timed(prober, turn, probed)
        return hashed(self.names, key) if losses is None else self.decide(losses)

    def _measured(self, losses: Losses) -> Sequence[str]:
        return self.names if losses.names is None else losses.names

    def decide(self, losses: Losses) -> Placed:
        """Say what measured losses mean for a session. A pure function."""
        names = self._measured(losses)
        if losses.n_tokens < MIN_TOKENS:
            return _too_short(names, losses)
        if losses.full is not None:
            return place_by_loss(names, losses.nodes, losses.full, min_quality=self.min_quality, n_cut=losses.n_cut)
        # Where nobody measured the whole model nothing is refused, and how good the best is is not known.
        least = losses.nodes[losses.nodes.mean(axis=1).argmin()]
        placed = place_by_loss(names, losses.nodes, least, min_quality=self.min_quality, n_cut=losses.n_cut)
        close = f"; too close to call: {', '.join(placed.candidates[1:])}" if len(placed.candidates) > 1 else ""
        reason = f"of the nodes {placed.best} predicts the prompt best, nobody told how the whole model does{close}"
        return replace(placed, excess=None, reason=reason)


async def _timed(prober: Prober, prompt: Prompt, probed: Callable[[float], None]) -> Losses | None:
    begin = time.monotonic()
    losses = await prober.losses(prompt)
    probed(time.monotonic() - begin)
    return losses


def hashed(names: Sequence[str], key: str) -> Placed:
    """Give a session a node by nothing but its key: no one could be measured, and no other is known to be as good."""
    node = min(names, key=lambda name: _rank(key, name))
    return _unmeasured([node], HASHED, 0)


def _too_short(names: Sequence[str], losses: Losses) -> Placed:
    where = "any node is as good" if losses.full is None else "use the whole model"
    reason = (
        f"the first turn has {losses.n_tokens} tokens, fewer than the {MIN_TOKENS} that tell where it belongs; {where}"
    )
    return _unmeasured(list(names) if losses.full is None else [], reason, losses.n_tokens)


def _unmeasured(candidates: list[str], reason: str, n_tokens: int) -> Placed:
    return Placed(
        node=candidates[0] if candidates else None,
        index=None,
        probe="loss",
        scores={},
        full=0.0,
        excess=None,
        captured=None,
        best=candidates[0] if candidates else FULL,
        quality=0.0,
        margin=None,
        error=None,
        candidates=candidates,
        reason=reason,
        n_tokens=n_tokens,
        n_cut=0,
    )


def _fit(placed: Placed, name: str) -> float | None:
    return None if placed.excess is None else min(1.0, exp(-placed.excess[name]))


def _rank(key: str, name: str) -> bytes:
    """Order names by a key: each key its own way, all replicas alike."""
    return hashlib.sha256(f"{key} {name}".encode()).digest()


def _as_text(turn: Prompt) -> list[str]:
    if isinstance(turn, str):
        return [turn]
    return [f"{part.role} {part.content}" if isinstance(part, Message) else str(part) for part in turn]


def _sentence(reason: str) -> str:
    return f"{reason}."
