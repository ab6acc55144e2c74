"""Arguments that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A GGUF file (any part of one in several), or the word 'tinymoe' for the embedded model.",
    ),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text for people.")]
