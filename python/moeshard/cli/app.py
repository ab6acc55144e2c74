"""The table of commands, and what becomes of their errors.

Command modules import nothing heavy at their top: `--help` runs all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moeshard.cli.analyze import analyze
from moeshard.cli.chat import chat
from moeshard.cli.curve import curve
from moeshard.cli.demo import demo
from moeshard.cli.evaluate import evaluate
from moeshard.cli.gateway import gateway
from moeshard.cli.generate import generate
from moeshard.cli.inspect import inspect
from moeshard.cli.merge import merge
from moeshard.cli.options import one_of
from moeshard.cli.place import place
from moeshard.cli.plan import plan
from moeshard.cli.recover import recover
from moeshard.cli.report import report
from moeshard.cli.serve import serve
from moeshard.cli.split import split
from moeshard.cli.terminal import (
    BROKEN_PIPE,
    OutputError,
    Voice,
    end_line,
    fail,
    finish,
    open_standard_files,
    say,
    writing_stdout,
)
from moeshard.cli.verify import verify
from moeshard.cli.worker import worker

# What typer raises for wrong usage. It is click's, or typer's own copy of it.
_UsageError: Any = typer.BadParameter.__base__

LOG_LEVELS = ("none", "error", "warn", "info", "debug")
LOG_VARIABLE = "MOESHARD_LOG"


class _Group(TyperGroup):
    """Turns what commands raise into one line on stderr and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        words = sys.argv[1:] if args is None else args
        Voice.as_json = "--json" in words
        open_standard_files()
        options["standalone_mode"] = False
        level = os.environ.get(LOG_VARIABLE)
        try:
            with _told():
                code = super().main(args, *rest, **options)
        except typer.Exit as leaving:
            code = leaving.exit_code
        except typer.Abort:
            code = 1
        finally:
            _set_log_level(level)
        sys.exit(finish(code if isinstance(code, int) else 0))

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _pipes(), writing_stdout():  # a help text, or a version
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _pipes():
            return super().invoke(ctx)


@contextmanager
def _pipes() -> Iterator[None]:
    """End quietly where the reader of stdout has left, or on Ctrl-C."""
    try:
        yield
    except BrokenPipeError:
        raise typer.Exit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        end_line()
        raise typer.Exit(130) from None


@contextmanager
def _told() -> Iterator[None]:
    """Tell the user of errors that are his to mend; others are ours, and keep their traceback."""
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            fail(error.format_message(), 2, _usage(error.ctx))
        raise typer.Exit(2) from None
    except OutputError as error:
        fail(str(error), 1)
        raise typer.Exit(1) from None
    except OSError as error:
        names = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
        fail(f"{names}: {error.strerror}" if names else error.strerror or str(error), 1)
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        # Looked up only now: it loads the native library.
        from moeshard import MoeshardError

        if not isinstance(error, MoeshardError):
            raise
        fail(str(error), 1)
        raise typer.Exit(1) from None


def _usage(ctx: Any) -> str:
    if ctx is None:
        return ""
    return f"{ctx.get_usage()}\nTry '{ctx.command_path} {ctx.help_option_names[0]}' for help."


# Without rich's help pages and tracebacks: importing rich takes longer than all the rest of --help.
app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _set_log_level(level: str | None) -> None:
    """Set what the engine reads when it first logs, here and in processes that a command starts."""
    if level is None:
        os.environ.pop(LOG_VARIABLE, None)
    else:
        os.environ[LOG_VARIABLE] = level


def _show_version(value: bool) -> None:
    if value:
        from moeshard import __version__
        from moeshard._core import system_info

        info = system_info()
        say(f"moeshard {__version__}")
        say(f"engine    llama.cpp of {info.llama_cpp.replace('==', ' ')}")
        say(f"backends  {', '.join(info.backends)}")
        for device in info.devices:
            say(f"device    {device}")
        say(f"built for {', '.join(info.features)}")
        raise typer.Exit


@app.callback()
def moeshard(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_show_version,
            is_eager=True,
            help="Show the version, the llama.cpp inside and what it computes with, and exit.",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what the engine logs: --log-level info.")
    ] = False,
    log_level: Annotated[
        str | None,
        typer.Option(
            envvar=LOG_VARIABLE,
            **one_of(*LOG_LEVELS),
            show_default="warn; none with --json",
            help=f"Show what the engine logs on stderr, from this level on: {', '.join(LOG_LEVELS)}.",
        ),
    ] = None,
) -> None:
    """Know which experts of a Mixture-of-Experts model your traffic needs, and run it with only those.

    Start with `moeshard demo`: it needs no model and no network.
    """
    usual = "none" if Voice.as_json else "warn"
    _set_log_level(log_level or ("info" if verbose else usual))


app.command(short_help="Show architecture, routing and sizes of a model.")(inspect)
app.command(short_help="Generate text with all experts or some.")(generate)
app.command(short_help="Chat in the terminal.")(chat)
app.command(short_help="Measure which experts some text uses.")(analyze)
app.command(short_help="Measure what is lost by how many experts are kept.")(curve)
app.command(short_help="Choose the experts of each node by a profile.")(plan)
app.command(short_help="Give nodes back what their missing experts did.")(recover)
app.command(short_help="Measure what the nodes of a plan lose.")(evaluate)
app.command(short_help="Say which node should have a session.")(place)
app.command(short_help="Serve a model to OpenAI's clients.")(serve)
app.command(short_help="Serve the nodes of a plan, each a server of its own.")(gateway)
app.command(short_help="Hold layers for models of other machines.")(worker)
app.command(short_help="Draw what was measured, on one page.")(report)
app.command(short_help="Write shards: GGUF files with some of the experts.")(split)
app.command(short_help="Compare a shard with the model it was taken from.")(verify)
app.command(short_help="Put shards together again.")(merge)
app.command(short_help="See what half of the experts is worth. Start here.")(demo)
