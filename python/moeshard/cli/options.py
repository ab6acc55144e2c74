"""Arguments that commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", re.ASCII | re.IGNORECASE)

_SUSPICIOUS = 4096
"""A smaller number without a unit was meant to have one: of nothing here so few bytes make sense."""


def parse_size(text: str) -> int:
    """Read ``4GiB``, ``500MB`` or a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise typer.BadParameter(f"'{text}' is not a size; write bytes, or a number with a unit such as 4GiB or 500MB")
    n_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if not match[2] and n_bytes < _SUSPICIOUS:
        raise typer.BadParameter(f"'{text}' is {n_bytes} bytes; did you mean {n_bytes}GiB?")
    return n_bytes


def check_template(chats: Sequence[Path] | None, template: str | None) -> None:
    """Refuse a chat template where there are no chats."""
    if template is not None and not chats:
        raise typer.BadParameter("--chat-template goes with --chat")


def one_of(*names: str, several: bool = False) -> dict[str, Any]:
    """Return the arguments of an option whose value is one of some names.

    Args:
        names: the names; or ``module:NAME``, where they are (or what returns them), looked up only when needed.
        several: more of them may be given, after commas.
    """

    def known() -> Sequence[str]:
        module, colon, name = names[0].partition(":")
        if not colon:
            return names
        found = getattr(import_module(module), name)
        return tuple(found() if callable(found) else found)

    def read(text: str) -> str:
        for part in text.split(",") if several else [text]:
            if part.strip() not in known():
                raise typer.BadParameter(f"'{part.strip()}' is unknown; choose from {', '.join(known())}")
        return text

    def complete(incomplete: str) -> list[str]:
        return [name for name in known() if name.startswith(incomplete)]

    return {"parser": read, "autocompletion": complete, "metavar": "NAME"}


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A GGUF file (any part of one in several), or the word 'tinymoe' for the embedded model.",
    ),
]

TextOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE",
        show_default="the embedded texts",
        help="A text of the traffic; several of one NAME make one domain.",
    ),
]

HeldOutOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE",
        show_default="the embedded held-out texts",
        help="A text to predict, none that experts were chosen by; several of one NAME make one domain.",
    ),
]

ChatsOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help='Chats, a line of JSON each: {"messages": [{"role": …, "content": …}, …]}.'),
]

ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        show_default="the model's own",
        help="Write chats in this template: a file of Jinja, the name of another template of the model, or of one that "
        "llama.cpp knows, such as chatml.",
    ),
]

JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object instead of text for people; errors and warnings are JSON on stderr, one a line.",
    ),
]

ThreadsOption = Annotated[int, typer.Option(min=0, help="Threads that compute; 0: one per processor.")]

GpuLayersOption = Annotated[int, typer.Option(min=-1, help="Layers on the GPU, where there is one; -1: all.")]

RpcOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT,…",
        help="Workers that hold the layers, in this order, instead of this machine: see 'moeshard worker'.",
    ),
]

SplitOption = Annotated[
    str | None,
    typer.Option(
        metavar="N,…", show_default="as fits their memory", help="How many layers each worker of --rpc holds."
    ),
]


def pipeline(rpc: str | None, split: str | None) -> dict[str, Any]:
    """Return what --rpc and --split say, as arguments of `moeshard.Model`."""
    if rpc is None:
        if split is not None:
            raise typer.BadParameter("--split goes with --rpc")
        return {}
    workers = [part.strip() for part in rpc.split(",")]
    if split is None or split == "auto":
        return {"rpc": workers}
    parts = [part.strip() for part in split.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise typer.BadParameter(f"'{split}' is no split; write a number of layers for each worker, e.g. 16,16,29")
    return {"rpc": workers, "layer_split": [int(part) for part in parts]}


ForceOption = Annotated[bool, typer.Option("--force", help="Replace existing files.")]

JobsOption = Annotated[int, typer.Option(min=0, help="Threads that copy; 0: as many as are useful.")]

MaxFileSizeOption = Annotated[
    int | None,
    typer.Option(
        parser=parse_size, metavar="SIZE", help="Divide a larger file into numbered parts, such as 4GiB each."
    ),
]
