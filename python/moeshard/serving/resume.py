"""Going on elsewhere with an answer that has begun: the prompt and the text so far are read there, and continued."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeshard.serving.backends import Ask, Event


@dataclass
class Told:
    """What the client has of an answer."""

    text: str = ""
    n_generated: int = 0

    def add(self, event: Event) -> None:
        self.text += event.text
        self.n_generated = event.n_generated


def can_resume(ask: Ask) -> bool:
    """Whether an answer can be continued by who has not begun it.

    Not under a grammar, whose state is where it was, and not after an echo, whose text is no part of the answer.
    Penalties on frequency and presence, and the seed, begin anew.
    """
    return not (ask.options.grammar or ask.options.echo)


def resumed(ask: Ask, told: Told) -> Ask:
    """Return what is asked of who continues."""
    left = ask.options.max_tokens
    if left >= 0:
        left = max(0, left - told.n_generated)
    return replace(ask, begun=ask.begun + told.text, options=replace(ask.options, max_tokens=left))


def continued(event: Event, before: Told) -> Event:
    """Return an event of the continuation as one of the whole answer: what was told before counts as answer."""
    n = before.n_generated
    return replace(event, n_prompt=max(0, event.n_prompt - n), n_generated=n + event.n_generated) if n else event
