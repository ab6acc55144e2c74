"""Drawing from the likeliest tokens alone is drawing from all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeshard._core as _core
from moeshard import MoeshardError


@pytest.fixture(scope="module")
def native(tinymoe: Path) -> _core.Model:
    return _core.Model(str(tinymoe))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {},
        {"temperature": 1.5, "top_k": 1},
        {"temperature": 1, "top_k": 256, "top_p": 0.9, "min_p": 0},
        {"temperature": 2, "top_k": 40, "top_p": 1, "min_p": 0},
        {"temperature": 1, "top_k": 200, "min_p": 0.01, "grammar": "root ::= [a-z ]*"},
    ],
)
def test_the_likeliest_alone_are_drawn_as_from_all(native: _core.Model, params: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    few = _core.Sampler(native, _core.SamplingParams(**params, seed=3))
    # A bias that changes nothing makes the whole vocabulary candidates.
    everything = _core.Sampler(native, _core.SamplingParams(**params, seed=3, logit_bias=[(5, 0.0)]))
    for _ in range(60):
        logits = rng.permutation(np.linspace(-4, 12, native.n_vocab, dtype=np.float32))
        assert few.sample(logits) == everything.sample(logits)


def test_the_first_of_equals_is_the_likeliest(native: _core.Model) -> None:
    logits = np.zeros(native.n_vocab, dtype=np.float32)
    logits[[70, 90, 4000]] = 1
    assert _core.Sampler(native, _core.SamplingParams(temperature=0)).sample(logits) == 70


@pytest.mark.parametrize("where", [0, 39, 40, 4095])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 0}])
def test_a_score_that_is_no_number_is_an_error(native: _core.Model, params: dict[str, Any], where: int) -> None:
    logits = np.linspace(10, 0, native.n_vocab, dtype=np.float32)
    logits[where] = np.nan
    with pytest.raises(MoeshardError, match="NaN"):
        _core.Sampler(native, _core.SamplingParams(**params)).sample(logits)


def test_none_but_the_impossible(native: _core.Model) -> None:
    logits = np.full(native.n_vocab, -np.inf, dtype=np.float32)
    logits[7] = 0
    for params in ({"temperature": 0}, {}):
        assert _core.Sampler(native, _core.SamplingParams(**params)).sample(logits) == 7
