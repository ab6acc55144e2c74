"""Tables, sizes and progress, as commands show them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moeshard.cli.terminal import pour_styled, printable, warn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moeshard.progress import StageProgress
    from moeshard.traffic.likeness import Likeness

# What takes no longer than this shows no progress bar.
PATIENCE_SECONDS = 0.5
# Tables are as wide as what they hold where nobody has to look at them line by line.
UNLIMITED = 10_000
READABLE = 80
"""Characters of a line of text there."""
NAME_WIDTH = 12
"""Of a column of names, where a terminal is too narrow for them."""


def console(*, stderr: bool = False) -> Console:
    """Return a console that takes text as it is: no markup, no emoji, nothing that is not printable."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(text), **options)

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Plain(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if terminal else UNLIMITED)


def plain_table(title: str | None = None) -> Table:
    """Return an empty table without lines."""
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)


def show(*renderables: Any, style: str | None = None) -> None:
    """Print tables and paragraphs to stdout, each on lines of its own.

    On a terminal that is too narrow for a table names are shortened or folded, never numbers: they are what it is for.
    """
    from rich.table import Table

    out = console()
    width = out.width
    for renderable in renderables:
        out.width = max(width, _narrowest(renderable)) if isinstance(renderable, Table) else page_width()
        with out.capture() as captured:
            out.print(renderable, style=style)
        # Rich fills lines up to the width of the table.
        pour_styled("".join(f"{line.rstrip()}\n" for line in captured.get().split("\n")[:-1]))


def page_width() -> int:
    """Return how wide lines of text are: as the terminal, or what is good to read where there is none."""
    width = console().width
    return READABLE if width == UNLIMITED else width


def _narrowest(table: Table) -> int:
    """Give numbers the width they need, and return how wide the table is at least."""
    from rich.cells import cell_len

    total = 0
    for column in table.columns:
        cells = [str(cell) for cell in column.cells]
        widest = max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)
        if column.justify == "right":
            header = str(column.header)
            column.min_width = max(widest, *map(cell_len, header.split() if not column.no_wrap else [header]), 0)
            total += column.min_width
        else:
            total += min(widest, NAME_WIDTH)
    _, right, _, left = table.padding
    gaps = (left + right) * (len(table.columns) - (not table.pad_edge))
    lines = len(table.columns) + 1 if table.box and table.show_edge else 0
    return total + gaps + lines


def warn_of_text(found: Likeness) -> None:
    """Warn where figures are of text that is too near to what experts were chosen by, or of other kinds."""
    for sentence in found.sentences():
        warn(sentence)


def span(fewest: int, most: int) -> str:
    """Write how many experts layers hold: ``32``, or ``9-58`` where it is not equally many."""
    return str(most) if fewest == most else f"{fewest}-{most}"


@contextmanager
def progress() -> Iterator[StageProgress]:
    """Show a bar on stderr while the block runs, if that is a terminal and the block is not done soon."""
    if not sys.stderr.isatty():
        yield lambda what, fraction: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console(stderr=True), transient=True)
    task = bar.add_task("", total=1.0)
    start = time.monotonic()
    # By a thread: work that reports rarely, a large model's, is seen to run before its first report.
    timer = threading.Timer(PATIENCE_SECONDS, bar.start)
    timer.daemon = True
    timer.start()

    def update(what: str, fraction: float) -> None:
        bar.update(task, description=printable(what), completed=fraction)
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
