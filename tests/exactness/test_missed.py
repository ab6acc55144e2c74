"""The meter says what a keep makes tokens miss, whatever way the architecture chooses its experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from compare import random_keep
from specimens import SPECIMENS

import moeshard


def missed_by_hand(
    model: moeshard.Model, tokens: npt.NDArray[np.int32], keep: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Return the shares (n_tokens, n_layers), each layer from a trace in which it and all above it are whole.

    What comes into a layer's router hangs on the layers below it alone, so such a trace says what the router would have
    chosen in the masked stream.
    """
    columns = []
    for layer in model.moe_layers:
        below = keep.copy()
        below[layer:] = True
        trace = model.trace(tokens, below)
        if layer not in trace.layers:
            columns.append(np.full(tokens.size, np.nan))
            continue
        row = trace.layers.index(layer)
        weights = trace.weights[row].astype(np.float64) * (trace.ids[row] >= 0)
        lost = ~keep[layer][trace.ids[row]]
        columns.append((weights * lost).sum(axis=1) / weights.sum(axis=1))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("name", SPECIMENS)
def test_as_traces_of_the_masked_stream_say(make: Callable[[str], Path], name: str) -> None:
    model = moeshard.Model(make(name), n_threads=1)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, model.n_vocab, 24, dtype=np.int32)
    keep = random_keep(rng, model.n_layer, model.n_expert, model.n_expert_used, model.routing.n_group)
    wanted = missed_by_hand(model, tokens, keep)
    with model.session(n_ctx=tokens.size) as session:
        session.set_keep(keep, 0)
        session.set_meter(True)
        session.decode({0: tokens}, "all")
        found = session.missed_by_layer(0)
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    assert np.nanmax(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_without_output_the_last_layer_computes_one_token(make: Callable[[str], Path]) -> None:
    model = moeshard.Model(make("qwen3moe"), n_threads=1)
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, model.n_vocab, 24, dtype=np.int32)
    keep = random_keep(rng, model.n_layer, model.n_expert, model.n_expert_used)
    wanted = missed_by_hand(model, tokens, keep)
    wanted[:-1, -1] = np.nan
    with model.session(n_seq=2, n_ctx=tokens.size) as session:
        session.set_keep(keep, 0)
        session.set_meter(True)
        session.decode({0: tokens, 1: tokens[:5]})
        np.testing.assert_allclose(session.missed_by_layer(0), wanted, atol=1e-5)
        np.testing.assert_allclose(session.missed(0), np.nanmean(wanted, axis=1), atol=1e-5)
        assert session.missed(1).size == 0
        session.set_meter(False)
        session.reset()
        session.decode({0: tokens})
        assert session.missed(0).size == 0
