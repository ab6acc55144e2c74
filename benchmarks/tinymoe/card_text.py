"""The card's text: Markdown made of the facts that `card.measure` found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .sources import DOMAINS, SOURCES, WEIGHTS


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def _shape(f: dict[str, Any]) -> str:
    c = f["config"]
    router = "sigmoid scores with a selection bias" if c["sigmoid"] else "softmax"
    text = (
        f"`{f['file']}`: architecture `{c['arch']}`, {c['layers']} layers, width {c['width']}, {c['experts']} experts "
        f"of width {c['expert_width']}, top-{c['used']} ({router}, weights renormalised), byte-level BPE of "
        f"{c['vocab']}, {f['parameters']:,} parameters, {f['bytes']:,} bytes, sha256 `{f['sha256']}`. "
        f"Trained on {f['tokens']:,} tokens in {f['steps']:,} steps ({f['seconds'] / 60:.0f} minutes, 2 shared cores)."
    )
    return text


def _quality(f: dict[str, Any]) -> str:
    b = f["bits_per_byte"]
    if "first_model_heldout" not in b:
        return table(["domain", "bits per byte"], [[d, f"{v:.3f}"] for d, v in b["heldout"].items()])

    def pair(own: str, other: str, d: str) -> list[str]:
        if d not in b.get(own, {}):
            return ["", "", ""]
        x, y = b[own][d], b[other][d]
        return [f"{x:.3f}", f"{y:.3f}", f"{100 * (x / y - 1):+.1f} %"]

    head = ["domain", "held-out", "first model", "", "first model's held-out", "first model", ""]
    rows = [
        [d, *pair("heldout", "first_model_heldout", d), *pair("first_heldout", "first_model_first_heldout", d)]
        for d in DOMAINS
    ]
    return table(head, rows)


def _agreement(f: dict[str, Any]) -> str:
    rows = [
        [kind, f"{a['largest_difference']:.1e}", f"{100 * a['close']:.1f} %", f"{100 * a['top1']:.2f} %",
         f"{a['kl']:.1e}"]
        for kind, a in f["agreement"].items()
    ]  # fmt: skip
    head = ["file", "largest difference / largest logit", "windows under 1e-3", "top-1 agreement", "mean KL, nats"]
    return table(head, rows)


def _routing(f: dict[str, Any]) -> str:
    r = f["routing"]
    first = f["config"]["layers"] - len(r["entropy"])
    rows = [
        [str(i + first), f"{100 * low:.2f} %", f"{100 * high:.1f} %", f"{e:.2f}"]
        for i, (low, high, e) in enumerate(zip(r["load_min"], r["load_max"], r["entropy"], strict=True))
    ]
    return table(["layer", "least loaded expert", "most loaded expert", "entropy of the scores, nats"], rows)


def _drop(f: dict[str, Any]) -> str:
    d = f["drop"]
    rows = [[k, *(f"{d[k][x]:.2f}" for x in ("all", "random", "salient", "salient_in_domain"))] for k in DOMAINS]
    n = str(d["kept"])
    return table(["domain", "all experts", f"{n} random", f"{n} most salient", f"{n} most salient in the domain"], rows)


def _samples(f: dict[str, Any]) -> str:
    return "\n\n".join(f"`{d}`\n\n```text\n{f['samples'][d].strip()}\n```" for d in DOMAINS)


def corpus_table(f: dict[str, Any]) -> str:
    rows = [
        [d, f"{c['train_documents']:,}", f"{c['train_bytes'] / 1e6:.1f}", f"{c['train_tokens'] / 1e6:.2f}",
         f"{100 * WEIGHTS[d]:.0f} %"]
        for d, c in f["corpus"].items()
    ]  # fmt: skip
    return table(["domain", "documents", "MB", "million tokens", "share of a batch"], rows)


def licence_table() -> str:
    rows = [[s.package, s.domain, s.licence, "yes" if s.embed else "training only"] for s in SOURCES]
    return table(["Debian package", "domain", "licence of the files read", "may be embedded"], rows)


def model_section(f: dict[str, Any]) -> str:
    """The part of the card on one model."""
    c = f["config"]
    mean = 100 * c["used"] / c["experts"]
    return f"""## {f["name"]}

{_shape(f)}

### Held-out text

Bits per byte in llama.cpp, the shipped Q8_0 file, windows of 256 tokens, every token of the window scored.

{_quality(f)}

### The file computes what was trained

Logits of llama.cpp against torch's in F32, on {len(DOMAINS)} domains of held-out text; keys and values in F32. A window
that differs by more in F32 is one in which two experts were nearly tied and rounding chose the other.

{_agreement(f)}

### Routing

On calibration text, all domains alike; the mean load is {mean:.2f} %.

{_routing(f)}

The {f["routing"]["kept"]} most salient experts of each layer (gate weight times norm of the output), compared between
domains:

![overlap of the most salient experts]({f["name"]}-overlap.png)

### Dropping experts

Held-out loss in nats per token when the routers may only choose {f["drop"]["kept"]} of {c["experts"]} experts a layer;
"random" is the mean of three draws.

{_drop(f)}

### Samples

Temperature 0.8, nothing else, one draw each; the first words are the prompt.

{_samples(f)}
"""


def card(facts: list[dict[str, Any]]) -> str:
    """The whole card; the first model is the one that ships."""
    sections = "\n".join(model_section(f) for f in facts)
    return f"""# tinymoe

Small Mixture-of-Experts language models, trained for moeshard from text that Debian packages ship. They exist to have
routing that was learned: for the demo, for tests, and for comparing ways to choose experts within minutes. They know
the look of their domains, not facts; do not rely on what they say.

This file is written by `python -m tinymoe card` from what it measures; `card.json` holds the same figures.

{sections}
## Corpus

Documents were split into train, calibration and held-out; near-duplicates, paragraphs and comments on copyright and
licence, and training documents that share passages with calibration or held-out text were removed (see `corpus.py`).

{corpus_table(facts[0])}

Licences, as each package's `debian/copyright` states them. Texts embedded in the package are short passages of these
works, under these licences.

{licence_table()}
"""
