"""The one way to stdout and stderr.

Results go to stdout, everything about the way there to stderr. Files and models may be called anything: what is written
is printable, so that no name can move the cursor, recolour a line or pretend to be another one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import typer

BROKEN_PIPE = 141
"""Exit code where the reader of stdout left: what the shell shows for a program that SIGPIPE ended."""

# Control characters of ASCII and Latin-1, what reorders or breaks lines, and halves of surrogate pairs (which stand for
# bytes of a path that are no UTF-8).
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class OutputError(Exception):
    """Stdout cannot be written to."""


class Voice:
    """How messages on stderr are written: for people, or with --json as JSON, an object a line."""

    as_json = False


def printable(text: str, *, lines: bool = False) -> str:
    """Return a text with escapes such as ``\\x1b`` in the place of what a terminal would act on.

    Line breaks and tabs stay where `lines` says that the text is more than a name.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character in "\n\t":
            return character
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            code -= 0xDC00
        named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
        return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

    return _UNPRINTABLE.sub(escape, text)


def command(*words: object) -> str:
    """Return a command line that can be copied into a shell as it is."""
    return shlex.join(str(word) for word in words)


def say(text: object = "", *, nl: bool = True, **style: Any) -> None:
    """Write a line of the result to stdout."""
    shown = printable(str(text), lines=True)
    with writing_stdout():
        typer.echo(typer.style(shown, **style) if style else shown, nl=nl)


def pour(text: str) -> None:
    """Write text to stdout that is the result itself, at once; bare unless a terminal would act on it."""
    with writing_stdout():
        sys.stdout.write(printable(text, lines=True) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def pour_bytes(data: bytes) -> None:
    """Write to stdout what is no text."""
    with writing_stdout():
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()


def pour_styled(text: str) -> None:
    """Write what has been made printable and styled already."""
    with writing_stdout():
        typer.echo(text, nl=False)


def print_json(value: Any) -> None:
    """Print one JSON value. What JSON has no word for (an infinite perplexity) is null."""
    with writing_stdout():
        typer.echo(_json(value, indent=2))


def _json(value: Any, indent: int | None = None) -> str:
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False)
    # Within strings JSON escapes only some of what a terminal acts on; outside of them there are but line breaks.
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def note(text: str) -> None:
    """Say on stderr in one dim line how the work went."""
    if not Voice.as_json:
        _stderr(f"[{printable(text)}]", dim=True)


def warn(text: str) -> None:
    """Say on stderr what the user should know before trusting a result."""
    if Voice.as_json:
        _stderr(_json({"warning": text}))
    else:
        _stderr(f"warning: {text}", fg=typer.colors.YELLOW)


def fail(text: str, code: int, usage: str = "") -> None:
    """Say on stderr why there is no result.

    Args:
        text: what is wrong, and what to do.
        code: the exit code that follows.
        usage: of a command that was called wrongly: how it is called.
    """
    if Voice.as_json:
        _stderr(_json({"error": text, "exit_code": code}))
        return
    if usage:
        _stderr(f"{usage}\n")
    _stderr("error: ", nl=False, fg=typer.colors.RED, bold=True)
    _stderr(text)


def end_line() -> None:
    """Leave the line on stderr that Ctrl-C was shown in."""
    _stderr("")


def _stderr(text: str, **style: Any) -> None:
    # Where stderr is full or closed there is nobody left to tell.
    with suppress(OSError, ValueError):
        typer.secho(printable(text, lines=True), err=True, **style)


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Tell errors of stdout from those of other files."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: closed by somebody in this process
        raise OutputError(f"cannot write to stdout: {getattr(error, 'strerror', None) or error}") from error


def open_standard_files() -> None:
    """See that descriptors 0 to 2 are open.

    A program may be started without them. The next files to be opened would take their numbers, and a model that is
    stdout is overwritten by the first result. Like other tools, refuse what is then written to stdout, not to stderr.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one. A stdout that is open for reading refuses what is written.
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, _reopened(number, "r" if name == "stdin" else "w"))
    # A model may write what the terminal's encoding lacks; that is no reason to stop.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _reopened(number: int, mode: str) -> IO[str]:
    return open(number, mode, closefd=False, encoding="utf-8", errors="replace")


def finish(code: int) -> int:
    """Write what is left of stdout, and return the exit code: another where that fails."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        gone = getattr(error, "errno", None) == errno.EPIPE
        if not gone and not code:
            fail(f"cannot write to stdout: {getattr(error, 'strerror', None) or error}", 1)
        code = code or (BROKEN_PIPE if gone else 1)
    if code:
        _discard()
    return code


def _discard() -> None:
    """Let what is still buffered vanish, so that Python does not complain of it at its very end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)
