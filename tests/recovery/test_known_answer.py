"""Recovery where the right answer is known: models whose dropped experts are siblings of those that are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_copy import Values, rewritten

import moeshard
from moeshard.gguf.identity import identify
from moeshard.planning.plan import Plan
from moeshard.recovery.recover import Recovered, recover
from moeshard.shards.split import custom_plan
from moeshard.traffic.domains import embedded_traffic

N, BORN = 32, 4
"""Experts kept; experts i, N + i, 2 N + i and 3 N + i are siblings."""


def siblings(name: str, values: Values) -> Values | None:
    """Give siblings the same router row, gate and up projection: all are chosen or none is, with equal activations."""
    if name.endswith(("ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight")):
        return np.concatenate([values[:N]] * BORN)
    return None


@pytest.fixture(scope="module")
def model(tinymoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(tinymoe, tmp_path_factory.mktemp("siblings") / "siblings.gguf", siblings)


@pytest.fixture(scope="module")
def plan(model: Path) -> Plan:
    """One node with the first of all siblings, which uses 2 experts per token where the model uses 2 and theirs."""
    identity = identify(moeshard.GGUFMap(model))
    keep = np.zeros((identity.n_layer, identity.n_expert), dtype=bool)
    keep[:, :N] = True
    return custom_plan(identity, [keep], ["quarter"], 2)


@pytest.fixture(scope="module")
def found(model: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recovered, Path]:
    out = tmp_path_factory.mktemp("recovery")
    texts = embedded_traffic("calibration")[:1]
    loaded = moeshard.Model(model, n_threads=1)
    options = {"n_windows": 48, "window": 128, "ridge": 1e-4, "parts": ["down"], "recover_type": "f16"}
    (one,) = recover(loaded, plan, out, texts, **options)  # type: ignore[arg-type]
    return one, Path(one.path)


def test_the_mean_of_all_projections_is_found(found: tuple[Recovered, Path], model: Path) -> None:
    """The weight of four in the model is that of one in the shard: the mean of their projections does what they did."""
    recovered = moeshard.GGUFMap(found[1])
    whole = moeshard.GGUFMap(model)
    for layer in range(5):
        name = f"blk.{layer}.ffn_down_exps.weight"
        original = moeshard._core.dequantize("q8_0", np.array(whole.tensors[name]).ravel(), 128 * 192 * 32)
        every = original.reshape(BORN, N, 192, 32)
        right, before = every.mean(axis=0), every[0]
        now = np.array(recovered.tensors[name]).astype(np.float32)
        # Of a quarter of the experts at least. Others have few tokens, and what these do not say is left to rounding.
        distance = np.linalg.norm((now - right).reshape(N, -1), axis=1)
        moved = np.linalg.norm((before - right).reshape(N, -1), axis=1)
        assert np.quantile(distance / moved, 0.25) < 0.3


def test_the_stream_lacks_next_to_nothing(found: tuple[Recovered, Path]) -> None:
    for layer in found[0].layers:
        assert layer.corrected
        assert layer.after < 0.2 * layer.before


def test_other_text_is_predicted_as_the_whole_model_does(
    found: tuple[Recovered, Path], model: Path, plan: Plan
) -> None:
    loaded = moeshard.Model(model, n_threads=1)
    texts = embedded_traffic("heldout")[:1]
    options = {"n_windows": 4, "window": 128, "n_answers": 0}
    masked = moeshard.evaluate(loaded, plan, texts, **options)  # type: ignore[arg-type]
    corrected = moeshard.evaluate(loaded, plan, texts, recovery=found[1].parent, **options)  # type: ignore[arg-type]
    now, then = corrected.placed.agreement, masked.placed.agreement
    assert now is not None and then is not None
    assert now.kl < 0.1 * then.kl
    assert now.top1 > then.top1
