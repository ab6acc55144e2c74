"""The table of commands, and what becomes of their errors.

Command modules import nothing heavy at their top: `--help` runs all of them.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moeshard.cli.analyze import analyze
from moeshard.cli.chat import chat
from moeshard.cli.curve import curve
from moeshard.cli.demo import demo
from moeshard.cli.evaluate import evaluate
from moeshard.cli.generate import generate
from moeshard.cli.inspect import inspect
from moeshard.cli.merge import merge
from moeshard.cli.place import place
from moeshard.cli.plan import plan
from moeshard.cli.report import report
from moeshard.cli.serve import serve
from moeshard.cli.split import split
from moeshard.cli.verify import verify


class _Group(TyperGroup):
    """Turns what commands raise into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            typer.echo(err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            # Looked up only now: it loads the native library.
            from moeshard import MoeshardError

            if not isinstance(error, MoeshardError):
                raise
            typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None


# Without rich's help pages and tracebacks: importing rich takes longer than all the rest of --help.
app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        from moeshard import __version__

        typer.echo(f"moeshard {__version__}")
        raise typer.Exit


@app.callback()
def moeshard(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Know which experts of a Mixture-of-Experts model your traffic needs, and run it with only those.

    Start with `moeshard demo`: it needs no model and no network.
    """
    # A model may write what the terminal's encoding lacks; that is no reason to stop.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


app.command(short_help="Show architecture, routing and sizes of a model.")(inspect)
app.command(short_help="Generate text with all experts or some.")(generate)
app.command(short_help="Chat in the terminal.")(chat)
app.command(short_help="Measure which experts some text uses.")(analyze)
app.command(short_help="Measure what is lost by how many experts are kept.")(curve)
app.command(short_help="Choose the experts of each node by a profile.")(plan)
app.command(short_help="Measure what the nodes of a plan lose.")(evaluate)
app.command(short_help="Say which node should have a session.")(place)
app.command(short_help="Serve a model to OpenAI's clients.")(serve)
app.command(short_help="Draw what was measured, on one page.")(report)
app.command(short_help="Write shards: GGUF files with some of the experts.")(split)
app.command(short_help="Compare a shard with the model it was taken from.")(verify)
app.command(short_help="Put shards together again.")(merge)
app.command(short_help="See what half of the experts is worth. Start here.")(demo)
