"""What becomes of a request whose backend fails: before anything was told, another one answers it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from moeshard.serving.backends import FULL, Ask, Backend, Event
from moeshard.serving.decision import Decision
from moeshard.serving.errors import ApiError
from moeshard.serving.resume import Told, can_resume, continued, resumed


@dataclass
class Course:
    """Who answers a request; it may change while it does."""

    decision: Decision
    key: str | None = None
    """Of the session; None where the request names who is to answer: nobody else does then."""
    moved: dict[str, object] | None = None
    """From whom, and after how many tokens, where an answer was continued by another."""
    failed: set[str] = field(default_factory=set)
    """Who failed it."""


Instead = Callable[[Course, str, ApiError], "Decision | None"]
"""Says who takes over from a backend that failed; None: nobody."""


async def carried(
    ask: Ask,
    course: Course,
    backends: Mapping[str, Backend],
    instead: Instead,
    *,
    whole: bool,
    resume: bool,
) -> AsyncGenerator[Event, None]:
    """Yield the events of an answer, whoever gives them.

    Args:
        ask: what is asked.
        course: who is to answer; changed where another takes over.
        backends: all that there are.
        instead: see `Instead`.
        whole: nothing is told before the answer is done, so that another can always begin it anew.
        resume: an answer that has begun may be continued by another.

    Raises:
        ApiError: the request is wrong, or nobody could answer it.
    """
    told = Told()
    while True:
        name = course.decision.backend
        held: list[Event] = []
        before = replace(told)
        try:
            async with aclosing(backends[name].stream(ask)) as events:
                async for event in events:
                    if whole:
                        held.append(event)
                        continue
                    event = continued(event, before)
                    told.add(event)
                    yield event
        except ApiError as error:
            begun = bool(told.text or told.n_generated)
            if course.key is None or (begun and not (resume and can_resume(ask))):
                raise
            if course.decision.backend == name:  # not moved already for another of the request's prompts
                decision = _who_is_able(error, name, backends)
                if decision is None and error.is_ours:
                    decision = instead(course, name, error)
                if decision is None:
                    raise
                course.decision = decision
            if begun:
                course.moved = {"from": name, "after": told.n_generated}
                ask = resumed(ask, _since(told, before))
        else:
            for event in held:
                yield event
            return


def _since(told: Told, before: Told) -> Told:
    """Return what was told since an answer was last continued."""
    return Told(told.text[len(before.text) :], told.n_generated - before.n_generated)


def _who_is_able(error: ApiError, name: str, backends: Mapping[str, Backend]) -> Decision | None:
    """Return the whole model where it can do what a node cannot, through no fault of its own."""
    full = backends.get(FULL)
    if full is None or name == FULL or full.fault is not None:
        return None
    longer = error.code == "context_length_exceeded" and full.n_ctx > backends[name].n_ctx
    if error.code != "not_supported" and not longer:
        return None
    return Decision(FULL, "unable", f"{name} cannot do this: {error.message}", 1.0)


def is_wanted(told: str, default: bool) -> bool:
    """Read the header by which a client says whether its answers may be continued by another."""
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(told.lower(), default)
