"""The table of architectures and results: printed after the tests and kept in docs/architectures.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from specimens import ARCHITECTURES, MISSING, NOT_CAUSAL, SPECIMENS, UNUSED, VARIANTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
COLUMNS = ("no mask", "masked", "trace", "two masks in a batch", "2 shards", "4 shards")

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
  computing the same batch, and those of two separate runs within rounding.
- **2 shards**, **4 shards**: the experts of every layer are dealt out at random to as many files. Each loads in *stock*
  llama.cpp and chooses there the experts that the whole model chooses under a mask; its logits are those of the masked
  model; loading the same experts without a file gives them too; merged, the files are the whole model again, byte for
  byte.

"exact" means: to the last bit. A softmax over all experts sums fewer numbers in a shard, in another order, which
changes last bits of the weights. For such models "≤ 2e-6" is how far logits may be apart, relative to the largest, of
tokens that are sent to the same experts; a changed last bit may tip a near-tie of a router, and which ones depends on
the processor. That is measured in single precision. Models are usually run with a KV cache in half precision and
experts in less: there a changed last bit may round to the next of fewer numbers. Of the embedded tinymoe (Q8_0),
with 24 random keeps and 128 tokens each, logits were up to 6e-3 apart where the same experts were chosen. For 8 of
the 3,072 tokens rounding tipped a near-tie of the router: another expert was chosen, and logits were up to 6e-2 apart.
GELU is such a place too, which llama.cpp looks up in a table of half-precision numbers: models that use it have a
larger number in their row. GroveMoE with chunk experts refuses random keeps; those that it takes
([splitting.md](splitting.md)) are "≤ 2e-6".

Shards of 4, 8 or 12 experts are exact where the table says so. With a number that is no multiple of 4, llama.cpp's CPU
backend multiplies the router's matrix by another kernel, which sums in another order: all models are "≤ 2e-6" then.

Experts in F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4 and NVFP4 are
compared in the same way, on sigmoid-gated models, where all of them are exact.
"""


def rounding(tolerance: float) -> str:
    """Return the cell that says how far apart logits may be."""
    return f"≤ {tolerance:.0e}".replace("e-0", "e-")


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
