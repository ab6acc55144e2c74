"""The prompt that a command is given: its options, and how it is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeshard.files.text import readable

if TYPE_CHECKING:
    from moeshard.arrays import Tokens
    from moeshard.runtime.model import Model

PromptOption = Annotated[
    str | None, typer.Option("--prompt", "-p", help="The text to continue, or with --chat to answer.")
]

PromptFileOption = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", help="Read the prompt from a file, '-' for stdin; one line break at its end is dropped."
    ),
]

ChatOption = Annotated[bool, typer.Option("--chat", help="Format the prompt with the model's chat template.")]

SystemOption = Annotated[str | None, typer.Option(help="The system message, with --chat.")]


def read_prompt(prompt: str | None, file: Path | None, chat: bool, system: str | None, template: str | None) -> str:
    """Return the prompt that these options give, before any template; where they contradict each other, say so."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give the prompt with either --prompt or --file")
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat")
    if template is not None and not chat:
        raise typer.BadParameter("--chat-template needs --chat")
    for option, text in (("--prompt", prompt), ("--system", system)):
        if text is not None and readable(text) != text:
            raise typer.BadParameter(f"{option} is not UTF-8 text: '{readable(text)}'")
    if file is None:
        assert prompt is not None
        return prompt
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot read the prompt from '{file}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"the prompt in '{file}' is not UTF-8 text: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def apply_template(
    model: Model, text: str, chat: bool, system: str | None, template: str | None
) -> tuple[str, str | Tokens]:
    """Return the prompt as text for people, and as the model is to read it."""
    if not chat:
        return text, text
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    template = template or ""
    return model.chat_prompt(messages, template=template), model.chat_tokens(messages, template=template)
