"""The table of architectures and results: printed after the tests and kept in docs/architectures.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from specimens import ARCHITECTURES, MISSING, NOT_CAUSAL, SPECIMENS, UNUSED, VARIANTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
COLUMNS = ("no mask", "masked", "trace", "two masks in a batch")

HEAD = """# Architectures

<!-- Written by `pytest tests/exactness --rewrite-architectures`. Do not edit: a test compares it with its results. -->

For every architecture of the pinned llama.cpp that routes to experts, the tests make a tiny random model (16 experts,
4 per token) and compare moeshard with *stock* llama.cpp on the CPU. Stock llama.cpp gets its mask through its public
evaluation callback, which sets the dropped experts' router scores to -inf as they are computed.

- **no mask**: the logits of every token are those of stock llama.cpp.
- **masked**: the same under random masks that differ in every layer, in one micro-batch and in several.
- **trace**: the experts chosen, their weights and all router scores are those that stock llama.cpp computed, and the
  norms of the experts' outputs are within float32 rounding.
- **two masks in a batch**: two sequences under different masks in one batch give the logits of stock llama.cpp
  computing the same batch, those of two separate runs within rounding, and exactly the experts of those runs.

"exact" means: to the last bit.
"""


def row(name: str, cells: Mapping[str, str]) -> str:
    note = VARIANTS.get(name, "attention is not causal" if name in NOT_CAUSAL else "")
    return f"| `{name}` | " + " | ".join(cells.get(column, "") for column in COLUMNS) + f" | {note} |"


def document(results: Mapping[str, Mapping[str, str]]) -> str:
    """Return the text of docs/architectures.md."""
    assert set(results) == set(SPECIMENS)
    lines = [HEAD, f"{len(ARCHITECTURES)} architectures and {len(VARIANTS)} variants:", ""]
    lines.append("| model | " + " | ".join(COLUMNS) + " | note |")
    lines.append("|---|" + "---|" * len(COLUMNS) + "---|")
    lines += [row(name, results[name]) for name in (*ARCHITECTURES, *VARIANTS)]
    lines += ["", "Not compared:", ""]
    missing = {name: why for name, why in (UNUSED | MISSING).items() if "+" not in name}
    lines += [f"- `{name}`: {why}." for name, why in sorted(missing.items())]
    return "\n".join(lines) + "\n"


def summary(results: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the lines printed at the end of a test run."""
    width = max(len(name) for name in results)
    lines = [f"{'':{width}}  " + "  ".join(COLUMNS)]
    for name, cells in results.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{cells.get(c, '-'):{len(c)}}" for c in COLUMNS))
    return lines
