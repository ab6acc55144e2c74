"""Scores against what can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

import moeshard
from moeshard.evaluation.perplexity import Score, score
from moeshard.traffic.windows import text_windows


class Fake:
    """A model that gives the logits it was made with, whatever the tokens."""

    def __init__(self, row: npt.ArrayLike):
        self.row = np.asarray(row, dtype=np.float32)

    def logits(self, tokens: npt.NDArray[np.int32], keep: object = None) -> npt.NDArray[np.float32]:
        return np.tile(self.row, (tokens.size, 1))


def fake_score(row: npt.ArrayLike, windows: list[npt.NDArray[np.int32]]) -> Score:
    return score(Fake(row), windows)  # type: ignore[arg-type]


def test_windows_predict_every_token_but_the_first_once() -> None:
    tokens = np.arange(11)
    windows = text_windows(tokens, 3)
    assert [list(window) for window in windows] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert all(window.dtype == np.int32 for window in windows)


def test_fewer_windows_are_spread_over_the_text() -> None:
    starts = [int(window[0]) for window in text_windows(np.arange(101), 10, 4)]
    assert starts == [0, 20, 50, 70]
    assert len(text_windows(np.arange(101), 10, 1000)) == 10


def test_short_text_is_an_error() -> None:
    with pytest.raises(moeshard.MoeshardError, match="10 tokens is too short for a window that predicts 10"):
        text_windows(np.arange(10), 10)


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    result = fake_score(np.full(50, 1e4), text_windows(np.arange(41), 10))
    assert result.perplexity == pytest.approx(50)
    assert result.n_tokens == 40


def test_known_probabilities() -> None:
    result = fake_score(np.log([0.5, 0.25, 0.25]), [np.array([2, 0, 0, 1], dtype=np.int32)])
    assert result.nll == pytest.approx(math.log(2) * (1 + 1 + 2), rel=1e-6)


def test_sums() -> None:
    total = Score(1.0, 10, 0.5) + Score(3.0, 30, 1.5)
    assert total == Score(4.0, 40, 2.0)
    assert total.tokens_per_second == 20
    assert total.perplexity == pytest.approx(math.exp(0.1))
    assert Score(1e9, 1, 1.0).perplexity == math.inf


def test_embedded_model_predicts_better_with_all_experts() -> None:
    model = moeshard.Model(moeshard.embedded_model(), n_threads=1)
    windows = text_windows(model.tokenize(moeshard.embedded_text("en")), 256, 2)
    steps: list[None] = []
    full = score(model, windows, progress=lambda: steps.append(None))
    assert len(steps) == 2
    assert full.perplexity < score(model, windows, "0-31").perplexity < model.n_vocab
