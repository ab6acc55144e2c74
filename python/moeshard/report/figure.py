"""What a report is made of: figures with what they say, and tables of their numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from moeshard.traffic.likeness import Likeness

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_csv(self) -> str:
        """Write it as CSV with a header; floats in full precision."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.header)
        # NaN: unknown.
        writer.writerows([["" if cell != cell else cell for cell in row] for row in self.rows])
        return buffer.getvalue()


@dataclass(frozen=True)
class Panel:
    """One picture of a figure; of several, a reader sees one at a time."""

    label: str
    draw: Callable[[Canvas], None]
    """Draws on an empty canvas of this size."""
    height: float
    """Inches."""


@dataclass(frozen=True)
class Figure:
    """One figure of a report."""

    name: str
    """Of its files: letters, digits and hyphens."""
    title: str
    says: Sequence[str]
    """Paragraphs of plain text: what there is to see."""
    panels: Sequence[Panel]
    data: Table
    """All numbers that are drawn, for the CSV file."""
    tables: Sequence[tuple[str, Table]] = field(default_factory=tuple)
    """Tables for people, each under a title."""
    quotes: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """Texts shown as they are, each under a title."""

    def stem(self, index: int) -> str:
        """Return the name of a panel's files, without ending."""
        return self.name if index == 0 else f"{self.name}-{index}"


def percent(share: float) -> str:
    """Write a share of 1 as ``41%``, with as many digits as a small one needs; NaN as unknown."""
    if math.isnan(share):
        return "unknown"
    digits = 0 if abs(share) >= 0.0995 or share == 0 else 1 if abs(share) >= 0.00995 else 2
    return f"{share:.{digits}%}"


def between(interval: Sequence[float], write: Callable[[float], str]) -> str:
    """Write an interval as ``0.12 to 0.15``; one of NaN as unknown."""
    if any(math.isnan(end) for end in interval):
        return "unknown"
    return f"{write(interval[0])} to {write(interval[1])}"


def listed(words: Iterable[str], most: int = 8) -> str:
    """Write ``a, b and c``; of very many, the first and how many more there are."""
    items = list(words)
    if len(items) > most:
        items = [*items[: most - 1], f"{len(items) - most + 1} more"]
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def counted(number: int, word: str) -> str:
    """Write ``1 node``, ``3 nodes``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def nats(value: float) -> str:
    """Write nats per token."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def times(value: float) -> str:
    """Write a perplexity, or how many times as large as another it is."""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def short_nats(value: float) -> str:
    """Write nats per token for a small cell."""
    return f"{value:.2f}"


def warnings(likeness: Likeness) -> list[str]:
    """Write what is wrong with the text that something was measured on, as sentences of a page."""
    return [f"Mind: {sentence}." for sentence in likeness.sentences()]
