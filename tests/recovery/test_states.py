"""What a reader of inner states hands out, beside what is known otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard import MoeshardError


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1, n_batch=64, n_ubatch=64)


def test_states_are_those_of_a_trace(model: moeshard.Model) -> None:
    """Several sequences of unlike length, cut into micro-batches: every token is at its place."""
    tokens = model.tokenize(moeshard.embedded_text("en"))
    sequences = [tokens[:150], tokens[150:190]]
    states = model.state_reader(2, 256).read(sequences, [1, 4])
    assert [state.layer for state in states] == [1, 4]
    for state in states:
        assert state.residual.shape == state.inputs.shape == (190, 192)
        assert state.hidden.shape == (190, 8, 32)
        for part, sequence in ((slice(0, 150), sequences[0]), (slice(150, 190), sequences[1])):
            trace = model.trace(sequence)
            # Batches of other sizes are summed in another order, which tips near ties.
            same = (trace.ids[state.layer] == state.ids[part]).all(axis=1)
            assert same.mean() > 0.9
            np.testing.assert_allclose(trace.weights[state.layer][same], state.weights[part][same], atol=0.02)


def test_the_last_residual_gives_the_logits(model: moeshard.Model) -> None:
    """After the last layer there are but a norm and the output: what is read is what the model goes on with."""
    tokens = model.tokenize(moeshard.embedded_text("de"))[:48]
    (state,) = model.state_reader(1, 256).read([tokens], [4])
    file = moeshard.GGUFMap(model.path)
    norm = np.array(file.tensors["output_norm.weight"])
    embedding = np.array(file.tensors["token_embd.weight"]).astype(np.float32)
    scaled = state.residual / np.sqrt(np.square(state.residual).mean(axis=1, keepdims=True) + 1e-6) * norm
    expected = scaled @ embedding.T
    found = model.logits(tokens)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # activations are rounded to half precision


def test_a_layer_before_the_last_is_the_same_whatever_follows(model: moeshard.Model) -> None:
    tokens = model.tokenize(moeshard.embedded_text("py"))[:60]
    reader = model.state_reader(1, 256)
    (alone,) = reader.read([tokens], [2])
    first, *_ = reader.read([tokens], [2, 3, 4])
    np.testing.assert_array_equal(alone.residual, first.residual)
    np.testing.assert_array_equal(alone.hidden, first.hidden)


def test_layers_that_cannot_be_read(model: moeshard.Model) -> None:
    reader = model.state_reader(1, 256)
    with pytest.raises(MoeshardError, match="not all of the layers"):
        reader.read([np.arange(20)], [2, 7])
    (state,) = reader.read([np.arange(20)], [2])  # and goes on
    assert np.isfinite(state.residual).all()
