"""Arguments that commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read ``4GiB``, ``500MB`` or a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise typer.BadParameter(f"'{text}' is not a size; write bytes, or a number with a unit such as 4GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


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

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text for people.")]

ThreadsOption = Annotated[int, typer.Option(min=0, help="Threads that compute; 0: one per processor.")]

GpuLayersOption = Annotated[int, typer.Option(help="Layers on the GPU, where there is one; -1: all.")]

ForceOption = Annotated[bool, typer.Option("--force", help="Replace existing files.")]

JobsOption = Annotated[int, typer.Option(min=0, help="Threads that copy; 0: as many as are useful.")]

MaxFileSizeOption = Annotated[
    int | None,
    typer.Option(
        parser=parse_size, metavar="SIZE", help="Divide a larger file into numbered parts, such as 4GiB each."
    ),
]
