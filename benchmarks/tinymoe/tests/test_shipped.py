"""The files in the repository are those the card speaks of, and still measure what it says. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parents[1]
CARD = HERE / "card.json"
WINDOW = 256
CHECK_BYTES = 8192

FACTS: list[dict[str, Any]] = json.loads(CARD.read_text()) if CARD.exists() else []
MODELS = [pytest.param(f, id=f["name"]) for f in FACTS if (HERE / "out" / f["file"]).exists()]


@pytest.mark.parametrize("facts", MODELS)
def test_file_is_the_measured_one(facts: dict[str, Any]) -> None:
    path = HERE / "out" / facts["file"]
    assert path.stat().st_size == facts["bytes"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]


@pytest.mark.parametrize("facts", MODELS)
def test_bits_per_byte_within_one_percent_of_the_card(facts: dict[str, Any]) -> None:
    moeshard = pytest.importorskip("moeshard")
    model = moeshard.Model(HERE / "out" / facts["file"])
    for domain, expected in facts["check"].items():
        text = (HERE / "out" / "heldout" / f"{domain}.txt").read_bytes()[:CHECK_BYTES].decode("utf-8", "ignore")
        tokens = model.tokenize(text, special=False)
        nats, size = 0.0, 0
        for start in range(0, len(tokens) - WINDOW, WINDOW):
            row = tokens[start : start + WINDOW + 1]
            logits = model.logits(row[:-1]).astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            nats += float((np.log(np.exp(logits).sum(1)) - logits[np.arange(WINDOW), row[1:]]).sum())
            size += len(model.detokenize(row[1:]).encode())
        assert nats / math.log(2) / size == pytest.approx(expected, rel=0.01), domain


@pytest.mark.parametrize("facts", MODELS)
def test_it_is_a_trained_mixture(facts: dict[str, Any]) -> None:
    """The promises of the card, on its own figures."""
    exact, half, eight = (facts["agreement"][k] for k in ("f32", "f16", "q8_0"))
    assert exact["largest_difference"] < 1e-3
    assert half["top1"] >= 0.99 and half["kl"] < 1e-3 and eight["kl"] < 1e-3
    experts, used = facts["config"]["experts"], facts["config"]["used"]
    assert max(facts["routing"]["load_max"]) < 4 * used / experts
    assert min(facts["routing"]["load_min"]) > 0
    for domain in facts["check"]:
        cost = facts["drop"][domain]
        assert cost["random"] > cost["salient"]
