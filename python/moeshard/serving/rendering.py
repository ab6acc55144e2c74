"""What the model reads for a chat."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.runtime.model import Model
from moeshard.runtime.session import as_tokens
from moeshard.serving.errors import invalid
from moeshard.serving.protocol import Message, Prompt

_LONG_TEXT = 10_000


@dataclass(frozen=True, eq=False)
class Rendered:
    """A prompt as the model is to read it."""

    tokens: npt.NDArray[np.int32]
    """(n,)."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer beside those that were asked for."""


class Renderer:
    """Makes tokens of prompts, by a model's chat template or another one.

    A model without a template reads plain text: ``role: text`` for each message and a line break between them, then
    ``assistant:``. Where it begins to write the next message, its answer ends.
    """

    def __init__(self, model: Model, template: str = ""):
        """`template` is Jinja, or the name of one that llama.cpp knows, and goes before the model's own."""
        self._model, self._template = model, template
        self.is_plain = not template and not model.has_chat_template

    def render(self, prompt: Prompt, *, answer: bool = True) -> Rendered:
        """Return what is read for a prompt; `answer` says whether an answer is to follow.

        Raises:
            MoeshardError: the template fails, or there is none of that name.
        """
        if isinstance(prompt, str):
            return Rendered(self._model.tokenize(prompt, parse=True))
        if prompt and isinstance(prompt[0], Message):
            messages = [message for message in prompt if isinstance(message, Message)]
            return self._plain(messages, answer) if self.is_plain else self._templated(messages, answer)
        return Rendered(as_tokens([token for token in prompt if isinstance(token, int)]))

    def _templated(self, messages: Sequence[Message], answer: bool) -> Rendered:
        as_dicts = [{"role": message.role, "content": message.content} for message in messages]
        return Rendered(self._model.chat_tokens(as_dicts, template=self._template, answer=answer))

    def _plain(self, messages: Sequence[Message], answer: bool) -> Rendered:
        lines = [f"{message.role}: {message.content}" for message in messages]
        text = "\n".join([*lines, "assistant:"] if answer else lines)
        return Rendered(self._model.tokenize(text), ("\nuser:", "\nsystem:", "\nassistant:"))


async def rendered(renderer: Renderer, prompt: Prompt, *, answer: bool = True) -> Rendered:
    """Return what is read for a prompt; a long one's tokens are made beside the event loop, which others wait for.

    Raises:
        ApiError: the chat template fails.
    """
    try:
        if _size(prompt) > _LONG_TEXT:
            return await asyncio.to_thread(renderer.render, prompt, answer=answer)
        return renderer.render(prompt, answer=answer)
    except MoeshardError as error:
        raise invalid(str(error), "messages") from error


def _size(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(part.content) if isinstance(part, Message) else 1 for part in prompt)
