"""A chat with this process's engine, without a server: what the terminal talks to."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from moeshard.serving.backends import Ask, Event
from moeshard.serving.decision import Decision
from moeshard.serving.local import Local
from moeshard.serving.placer import Placer, State
from moeshard.serving.protocol import Message, Options


class Conversation:
    """Messages so far, and who answers them."""

    def __init__(self, local: Local, placer: Placer, options: Options, system: str | None = None):
        self._backends = {backend.name: backend for backend in local.backends}
        self._placer, self._options, self._system = placer, options, system
        self.decision: Decision | None = None
        """Who answered last."""
        self.reset()

    def reset(self) -> None:
        """Forget all that was said."""
        self._key = secrets.token_hex(16)
        self._messages = [] if self._system is None else [Message("system", self._system)]

    async def say(self, text: str) -> AsyncGenerator[Event, None]:
        """Yield what the answer to a message consists of; closed early, what came so far counts as said.

        Raises:
            ApiError: nothing can be answered (the context is full, say); the message was not said then.
        """
        self._messages.append(Message("user", text))
        answer = ""
        try:
            prompt = tuple(self._messages)
            self.decision, _ = await self._placer.place(self._key, prompt, self._states)
            stream = self._backends[self.decision.backend].stream(Ask(prompt, self._options))
            async with aclosing(stream) as events:
                async for event in events:
                    answer += event.text
                    yield event
        finally:
            if answer:
                self._messages.append(Message("assistant", answer))
            else:
                self._messages.pop()

    def _states(self) -> dict[str, State]:
        return {name: State(backend.fault is None, backend.load.share) for name, backend in self._backends.items()}
