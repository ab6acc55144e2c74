"""`python -m tinymoe card`: measures an exported model and writes its card from the measurements alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch

from .card_text import card
from .engine import Engine
from .export import TYPES, load
from .measure import (
    agreement,
    bits_per_byte,
    most_salient,
    nll,
    overlap,
    profile,
    random_keep,
    torch_logits,
    windows,
)
from .sources import DOMAINS

matplotlib.use("Agg")

#: Windows per domain for agreement with torch, for routing profiles, and for the cost of dropping experts.
_AGREE, _PROFILE, _DROP = 4, 32, 12
_KEPT = 32

#: What the samples continue, one per domain.
PROMPTS = {
    "en": "The administrator should", "de": "Diese Option legt fest,", "fr": "Cette fonction renvoie",
    "es": "Esta orden muestra", "py": "def read_file(path):\n", "cpp": "template <class T>\nstruct ",
    "sh": "if [[ -n $", "json": '{\n "name": "', "math": "  $( The sum of", "old": "And the king said unto",
}  # fmt: skip


def check_text(folder: Path, domain: str) -> bytes:
    """The start of a held-out text: little enough for continuous integration to measure again."""
    return (folder / f"{domain}.txt").read_bytes()[:8192]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure_texts(model: Path, folder: Path, remembered: Path) -> dict[str, float]:
    """Bits per byte of every NAME.txt of a folder, in the order of the domains.

    Results are remembered in a file by the hashes of model and text: they take minutes and change with neither.
    """
    known: dict[str, float] = json.loads(remembered.read_text()) if remembered.exists() else {}
    engine = Engine(model)
    out = {}
    for d in DOMAINS:
        text = folder / f"{d}.txt"
        if not text.exists():
            continue
        key = f"{sha256(model)} {sha256(text)}"
        if key not in known:
            known[key] = bits_per_byte(engine.logits, engine.tokenize, engine.detokenize, text.read_bytes())
            remembered.write_text(json.dumps(known, indent=1) + "\n")
        out[d] = known[key]
    return out


def write(folder: Path, names: list[str], work: Path, first: Path | None, texts: Path | None) -> None:
    """Measure the models and write `CARD.md`, `card.json` and a heat map each into `folder`."""
    facts = []
    for i, name in enumerate(names):
        print(f"measuring {name}", flush=True)
        facts.append(measure(name, work, first if i == 0 else None, texts if i == 0 else None))
        draw_overlap(facts[-1]["routing"]["overlap"], folder / f"{name}-overlap.png")
    (folder / "card.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "CARD.md").write_text(card(facts))


def measure(name: str, work: Path, first: Path | None, texts: Path | None) -> dict[str, Any]:
    """Everything the card says of one model. `first`, `texts`: an earlier model and its own held-out texts."""
    torch.set_num_threads(1)
    checkpoint, out = work / name / "checkpoint.pt", work / "gguf"
    model = load(checkpoint)
    state = torch.load(checkpoint, weights_only=False)
    shipped = out / f"{name}-q8_0.gguf"
    engine = Engine(shipped)
    facts: dict[str, Any] = {
        "name": name, "file": shipped.name, "bytes": shipped.stat().st_size, "sha256": sha256(shipped),
        "config": asdict(model.c), "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": state["tokens"], "steps": state["step"], "seconds": round(state["seconds"]),
        "corpus": json.loads((work / "corpus.json").read_text()),
    }  # fmt: skip
    rows = {
        kind: {d: windows(engine.tokenize((work / kind / f"{d}.txt").read_bytes()), _PROFILE) for d in DOMAINS}
        for kind in ("calibration", "heldout")
    }
    known = work / "measured.json"
    facts["bits_per_byte"] = {"heldout": measure_texts(shipped, work / "heldout", known)}
    if texts:
        facts["bits_per_byte"]["first_heldout"] = measure_texts(shipped, texts, known)
    if first:
        facts["bits_per_byte"]["first_model_heldout"] = measure_texts(first, work / "heldout", known)
        if texts:
            facts["bits_per_byte"]["first_model_first_heldout"] = measure_texts(first, texts, known)
    facts["check"] = {
        d: bits_per_byte(engine.logits, engine.tokenize, engine.detokenize, check_text(work / "heldout", d))
        for d in DOMAINS
    }
    facts["agreement"] = measure_agreement(out, name, model, rows["heldout"])
    facts["routing"], saliency = measure_routing(model, rows["calibration"])
    facts["drop"] = measure_drop(model, rows["heldout"], saliency)
    facts["samples"] = {
        d: engine.sample(PROMPTS[d].encode(), 110, 0.8, seed=7).decode("utf-8", "replace") for d in DOMAINS
    }
    return facts


def measure_agreement(out: Path, name: str, model: Any, rows: dict[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
    inputs = [row[:-1] for d in DOMAINS for row in rows[d][:_AGREE]]
    reference = [torch_logits(model)(x) for x in inputs]
    found = {}
    for kind in TYPES:
        engine = Engine(out / f"{name}-{kind}.gguf")
        found[kind] = asdict(agreement(reference, [engine.logits(x) for x in inputs]))
    return found


def measure_routing(
    model: Any, rows: dict[str, npt.NDArray[np.int64]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    profiles = {d: profile(model, rows[d]) for d in DOMAINS}
    load_all = torch.stack([p.load for p in profiles.values()]).mean(0)
    kept = min(_KEPT, model.c.experts // 2)
    top = {d: most_salient(p.saliency, kept) for d, p in profiles.items()}
    facts = {
        "tokens": {d: int(rows[d][:, 1:].size) for d in DOMAINS},
        "load_max": load_all.max(1).values.tolist(),
        "load_min": load_all.min(1).values.tolist(),
        "load": [[round(x, 5) for x in row] for row in load_all.tolist()],
        "entropy": torch.stack([p.entropy for p in profiles.values()]).mean(0).tolist(),
        "kept": kept,
        "overlap": [[overlap(top[a], top[b]) for b in DOMAINS] for a in DOMAINS],
    }
    return facts, {d: p.saliency for d, p in profiles.items()}


def measure_drop(
    model: Any, rows: dict[str, npt.NDArray[np.int64]], saliency: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Mean held-out loss per domain with all experts, and with a quarter of them left, chosen three ways."""
    kept = min(_KEPT, model.c.experts // 2)
    everyone = most_salient(torch.stack(list(saliency.values())).mean(0), kept)
    out: dict[str, Any] = {"kept": kept}
    for d in DOMAINS:
        x = rows[d][:_DROP]
        random = [nll(model, x, random_keep(everyone.shape[0], everyone.shape[1], kept, seed)) for seed in range(3)]
        out[d] = {
            "all": nll(model, x),
            "random": sum(random) / len(random),
            "salient": nll(model, x, everyone),
            "salient_in_domain": nll(model, x, most_salient(saliency[d], kept)),
        }
    return out


def draw_overlap(matrix: list[list[float]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 4.6))
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(DOMAINS)), DOMAINS)
    axes.set_yticks(range(len(DOMAINS)), DOMAINS)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.7 else "k", fontsize=7)
    axes.set_title("Share of the most salient experts in common")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
