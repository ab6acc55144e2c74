"""How commands speak: results on stdout, everything about the way there on stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from moeshard.progress import StageProgress
    from moeshard.traffic.likeness import Likeness

# What takes no longer than this shows no progress bar.
PATIENCE_SECONDS = 0.5


def console() -> Console:
    """Return stdout for tables; colours only on a terminal."""
    from rich.console import Console

    return Console(highlight=False)


def plain_table(title: str | None = None) -> Table:
    """Return an empty table without lines."""
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)


def print_json(value: Any) -> None:
    """Print one JSON value. What JSON has no word for (an infinite perplexity) is null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def warn(text: str) -> None:
    """Say on stderr what the user should know before trusting a result."""
    import typer

    typer.secho(f"warning: {text}", fg=typer.colors.YELLOW, err=True)


def warn_of_text(found: Likeness) -> None:
    """Warn where figures are of text that is too near to what experts were chosen by, or of other kinds."""
    for sentence in found.sentences():
        warn(sentence)


def check_free(*paths: Path | None, force: bool) -> None:
    """Raise a `MoeshardError` where a file cannot be written: said before the work that it shall hold."""
    from moeshard import MoeshardError

    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise MoeshardError(f"{path}: the folder '{path.parent}' does not exist; make it, or choose another one")
        if path.exists() and not force:
            raise MoeshardError(f"{path}: exists already; choose another name, or replace it with --force")


def size(n_bytes: float) -> str:
    """Write bytes in the largest unit that leaves a number of at least one: ``17.3 GiB``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.{1 if n_bytes < 100 * factor else 0}f} {unit}"
    return f"{n_bytes:.0f} B"


def span(fewest: int, most: int) -> str:
    """Write how many experts layers hold: ``32``, or ``9-58`` where it is not equally many."""
    return str(most) if fewest == most else f"{fewest}-{most}"


@contextmanager
def progress() -> Iterator[StageProgress]:
    """Show a bar on stderr while the block runs, if that is a terminal and the block is not done soon."""
    if not sys.stderr.isatty():
        yield lambda what, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=1.0)
    start = time.monotonic()
    # By a thread: work that reports rarely, a large model's, is seen to run before its first report.
    timer = threading.Timer(PATIENCE_SECONDS, bar.start)
    timer.daemon = True
    timer.start()

    def update(what: str, fraction: float) -> None:
        bar.update(task, description=what, completed=fraction)
        if not bar.live.is_started and time.monotonic() - start > PATIENCE_SECONDS:
            bar.start()

    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def tokens_per_second(update: StageProgress, what: str) -> Callable[[int, int], None]:
    """Return what takes the tokens done and those of the whole, and shows how fast they are done.

    Those that were done before its first call do not count: they are of an earlier run.
    """
    first: list[tuple[int, float]] = []

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if not first:
            first.append((done, now))
        before, start = first[0]
        speed = f", {(done - before) / (now - start):.0f} tokens/s" if done > before and now > start else ""
        update(f"{what}{speed}", done / max(total, 1))

    return show
