"""Losses of keeps, measured side by side, against one model and one text at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard import MoeshardError
from moeshard.evaluation import Losses, measure_losses
from moeshard.perplexity import text_windows
from moeshard.traffic import Domain

WINDOW, PROMPT = 64, 16


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def domains() -> list[Domain]:
    return [Domain(name, (moeshard.embedded_text(name)[:4000],)) for name in ("en", "py")]


@pytest.fixture(scope="module")
def keeps(model: moeshard.Model) -> list[np.ndarray]:
    everything = np.ones((4, 128), dtype=bool)
    return [everything, model.keep("0-63"), model.keep("64-127")]


@pytest.fixture(scope="module")
def losses(model: moeshard.Model, keeps: list[np.ndarray], domains: list[Domain]) -> Losses:
    return measure_losses(model, keeps, domains, n_windows=3, window=WINDOW, n_prompt=PROMPT)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1, keepdims=True)
    return wide - peak - np.log(np.exp(wide - peak).sum(axis=1, keepdims=True))


def test_losses_are_those_of_each_keep_alone(
    model: moeshard.Model, keeps: list[np.ndarray], domains: list[Domain], losses: Losses
) -> None:
    row = 0
    for domain in domains:
        windows = text_windows(model.tokenize(domain.texts[0]), WINDOW)
        for number in range(3):
            tokens = windows[number * len(windows) // 3]
            position = np.arange(WINDOW)
            whole = log_softmax(model.logits(tokens[:-1]))
            # Batches of another size round otherwise, and quantised activations make steps of that.
            np.testing.assert_allclose(losses.full[row].mean(), -whole[position, tokens[1:]].mean(), rtol=0.01)
            for index, keep in enumerate(keeps):
                own = log_softmax(model.logits(tokens[:-1], keep))
                kl = (np.exp(whole) * (whole - own)).sum(axis=1)
                np.testing.assert_allclose(
                    losses.groups[index, row].mean(), -own[position, tokens[1:]].mean(), rtol=0.01
                )
                np.testing.assert_allclose(losses.kl[index, row].mean(), kl.mean(), rtol=0.03, atol=2e-3)
                same = (own.argmax(axis=1) == whole.argmax(axis=1)).mean()
                assert abs(losses.same[index, row].mean() - same) <= 4 / WINDOW
            row += 1
    assert row == len(losses.domain) == 6


def test_a_keep_of_everything_loses_nothing(losses: Losses) -> None:
    np.testing.assert_allclose(losses.groups[0], losses.full, atol=1e-5)
    assert np.abs(losses.kl[0]).max() < 1e-4 and losses.same[0].all()
    np.testing.assert_allclose(losses.captured[0], 1, rtol=1e-6)
    # The two halves share the rest between them.
    np.testing.assert_allclose(losses.captured[1] + losses.captured[2], 1, rtol=1e-6)
    assert losses.mean(losses.group_losses()[1]) > losses.mean(losses.full_loss()) + 0.05


def test_placement(losses: Losses) -> None:
    oracle = losses.placed_losses(losses.placement("oracle"))
    np.testing.assert_array_equal(oracle, losses.group_losses().min(axis=0))
    for probe in ("loss", "saliency"):
        node = losses.placement(probe)
        assert (losses.placed_losses(node) >= oracle).all()
    assert (losses.placement("saliency") == 0).all(), "the node that holds everything captures most"
    with pytest.raises(MoeshardError, match="loss, saliency or oracle"):
        losses.placement("luck")


def test_means_count_domains_alike(losses: Losses) -> None:
    values = np.where(losses.domain == 0, 1.0, 3.0)
    assert losses.mean(values) == 2
    assert losses.by_domain(values) == {"en": 1.0, "py": 3.0}


def test_bad_windows_are_named(model: moeshard.Model, keeps: list[np.ndarray]) -> None:
    with pytest.raises(MoeshardError, match="too short"):
        measure_losses(model, keeps, [Domain("tiny", ("a few words",))])
    with pytest.raises(MoeshardError, match="leave some to predict"):
        measure_losses(model, keeps, [Domain("x", ("text " * 500,))], window=64, n_prompt=64)
