"""`moeshard report`: what was measured, on a page that a person can read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeshard.cli.options import ForceOption


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            show_default=False,
            help="A profile, a plan, an evaluation, a curve, or some of them; they are recognised by what they hold.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The page to write; '-' for stdout, without the folder.")
    ] = Path("report.html"),
    force: ForceOption = False,
) -> None:
    """Draw what was measured: one HTML page that needs nothing but itself.

    Beside it, in a folder such as report_files, is every figure as PNG and its numbers as CSV. Needs matplotlib.
    """
    from moeshard.cli.files import STDOUT, Results
    from moeshard.cli.terminal import note, say
    from moeshard.report.figure import counted
    from moeshard.report.sources import read_sources
    from moeshard.report.writing import folder_of, report_page, write_report

    if out == STDOUT:
        Results(force=force).write(out, report_page(read_sources(files)))
        return
    made = write_report(read_sources(files), out, force=force)
    say(out)
    note(f"{counted(len(made), 'figure')}; as PNG and CSV in {folder_of(out)}")
