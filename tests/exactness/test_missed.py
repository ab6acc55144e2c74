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
from moeshard import GGUFMap, MoeshardError, _core


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


def shards_of(path: Path, tmp_path: Path, keep: npt.NDArray[np.bool_]) -> list[Path]:
    """Two shards that hold every expert between them, with the whole routers."""
    paths = [tmp_path / "one.gguf", tmp_path / "other.gguf"]
    for own, out in zip((keep, ~keep), paths, strict=True):
        moeshard.split(path, own, out, with_router=True)
    return paths


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss", "glm4moe", "ernie4_5-moe", "llama4", "deepseek2+nobias"])
def test_a_shard_with_its_routers_measures_what_the_mask_does(
    make: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = make(name)
    whole = moeshard.Model(path, n_threads=1)
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, whole.n_vocab, 24, dtype=np.int32)
    keep = np.zeros((whole.n_layer, whole.n_expert), dtype=bool)
    for row in keep:
        row[rng.choice(whole.n_expert, whole.n_expert // 2, replace=False)] = True
    paths = shards_of(path, tmp_path, keep)
    for own, shard in zip((keep, ~keep), paths, strict=True):
        found = []
        for model, mask in ((whole, own), (moeshard.Model(shard, n_threads=1), None)):
            with model.session(n_ctx=tokens.size) as session:
                session.set_keep(mask, 0)
                session.set_meter(True)
                logits = session.decode({0: tokens[:-1]}, "all")[0]
                missed = session.missed_by_layer(0)
                session.set_meter(True)  # once more, which changes nothing
                last = session.decode({0: tokens[-1:]}, "all")[0]
                missed = np.concatenate([missed, session.missed_by_layer(0)])
                found.append((np.concatenate([logits, last]), missed))
        assert np.nanmax(found[0][1]) > 0.1
        np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-5)
        # The routers take no part in what is computed.
        with moeshard.Model(shard, n_threads=1).session(n_ctx=tokens.size) as session:
            plain = [session.decode({0: part}, "all")[0] for part in (tokens[:-1], tokens[-1:])]
        assert np.array_equal(found[1][0], np.concatenate(plain))
        moeshard.verify(shard, path)
    moeshard.merge(paths, tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == path.read_bytes()


def test_routers_go_with_files_of_experts_and_cost_what_they_hold(make: Callable[[str], Path], tmp_path: Path) -> None:
    path = make("qwen3moe")
    model = moeshard.Model(path, n_threads=1)
    keep = np.zeros((model.n_layer, model.n_expert), dtype=bool)
    keep[:, ::2] = True
    sizes = []
    for with_router in (False, True):
        folder = tmp_path / str(with_router)
        written = moeshard.split(path, [keep, ~keep], folder, trunk_once=True, with_router=with_router)
        assert [shard.kind for shard in written] == ["trunk", "experts", "experts"]
        sizes.append([shard.bytes for shard in written])
        for shard in written:
            moeshard.verify(shard.paths[0], path)
        facts = _core.shard_facts(GGUFMap(written[1].paths[0]))
        assert facts is not None and facts.has_router == with_router
    routers = sum(
        info.nbytes
        for info in GGUFMap(path).tensor_infos
        if ".ffn_gate_inp." in info.name or "exp_probs_b" in info.name
    )
    assert sizes[0][0] == sizes[1][0]
    for without, with_them in zip(sizes[0][1:], sizes[1][1:], strict=True):
        assert routers <= with_them - without < routers + 200 * model.n_layer


@pytest.mark.parametrize("name", ["deepseek2+grouped", "deepseek4+hash"])
def test_where_a_shard_cannot_measure_it_is_not_written(make: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    model = moeshard.Model(make(name), n_threads=1)
    keep = np.ones((model.n_layer, model.n_expert), dtype=bool)
    with pytest.raises(MoeshardError, match="without its routers"):
        moeshard.split(model.path, keep, tmp_path / "shard.gguf", with_router=True)
    assert not (tmp_path / "shard.gguf").exists()
