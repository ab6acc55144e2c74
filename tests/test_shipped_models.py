"""The models in the repository are those their card speaks of, and still measure what it says."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeshard
from moeshard.traffic.embedded import embedded_domains, embedded_text

CARDS = Path(__file__).parents[1] / "benchmarks" / "tinymoe"
WINDOW = 256
CHECK_BYTES = 8192
TARGET = 0.88
"""Bits per byte of the embedded model, relative to the first one's, in the domains that it knew."""

FACTS: list[dict[str, Any]] = json.loads((CARDS / "card.json").read_text())
MODELS = [pytest.param(f, id=f["name"]) for f in FACTS]


def path_of(facts: dict[str, Any]) -> Path:
    return moeshard.embedded_model() if facts["name"] == "tinymoe" else CARDS / "models" / facts["file"]


def test_the_card_is_of_all_three() -> None:
    assert [f["name"] for f in FACTS] == ["tinymoe", "tinymoe-sigmoid", "tinymoe-mixtral"]
    assert [f["config"]["arch"] for f in FACTS] == ["qwen3moe", "deepseek2", "llama"]


@pytest.mark.parametrize("facts", MODELS)
def test_file_is_the_measured_one(facts: dict[str, Any]) -> None:
    path = path_of(facts)
    assert path.stat().st_size == facts["bytes"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]


@pytest.mark.parametrize("facts", MODELS)
def test_bits_per_byte_within_one_percent_of_the_card(facts: dict[str, Any]) -> None:
    model = moeshard.Model(path_of(facts), n_threads=1)
    assert sorted(facts["check"]) == embedded_domains()
    for domain, expected in facts["check"].items():
        text = embedded_text(domain).encode()[:CHECK_BYTES].decode("utf-8", "ignore")
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
    # A near tie of two experts falls the other way in a window in forty, and is seen in all that follows there.
    assert exact["close"] >= 0.95 and exact["top1"] == 1 and exact["kl"] < 1e-6
    assert min(half["top1"], eight["top1"]) >= 0.99 and max(half["kl"], eight["kl"]) < 1e-3
    experts, used = facts["config"]["experts"], facts["config"]["used"]
    assert max(facts["routing"]["load_max"]) < 4 * used / experts
    assert min(facts["routing"]["load_min"]) > 0
    costs = [facts["drop"][domain] for domain in facts["check"]]
    assert sum(cost["random"] for cost in costs) > sum(cost["salient"] for cost in costs)
    assert all(cost["random"] > cost["salient_in_domain"] for cost in costs)


def test_the_embedded_model_reached_its_aim() -> None:
    bits = FACTS[0]["bits_per_byte"]
    for domain in ("en", "de", "fr", "py", "cpp"):
        assert bits["heldout"][domain] <= TARGET * bits["first_model_heldout"][domain]
