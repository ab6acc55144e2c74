"""Routing rules that need more than one comparison: hash-routed layers, expert groups, statistics, threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from compare import assert_same_bits, random_keep
from old_profiles import old_file
from reference import Run

import moeshard
from moeshard import GGUFMap
from moeshard.placement.probes import saliency, saliency_held
from moeshard.planning.planner import choose_experts
from moeshard.profile.measure import analyze
from moeshard.profile.record import read_profile
from moeshard.profile.statistics import captured
from moeshard.traffic.domains import Domain
from moeshard.traffic.windows import sequences

Make = Callable[[str], Path]


def replaced(ids: list[int], keep: np.ndarray) -> list[int]:
    """The rule as the documentation states it: each dropped id becomes the next kept one that the token lacks."""
    out = list(ids)
    for i, expert in enumerate(ids):
        candidates = [(expert + step) % len(keep) for step in range(1, len(keep))]
        if not keep[expert]:
            out[i] = next(c for c in candidates if keep[c] and c not in out and c not in ids)
    return out


def test_hash_routed_layers_replace_dropped_experts(make: Make) -> None:
    model = moeshard.Model(make("deepseek4+hash"), n_threads=1)
    tokens = np.arange(model.n_vocab)[:128]
    free = model.trace(tokens)
    rng = np.random.default_rng(3)
    for n_keep in (model.n_expert_used, 6, 12):
        keep = np.zeros((model.n_layer, model.n_expert), dtype=bool)
        for row in keep:
            row[rng.choice(model.n_expert, n_keep, replace=False)] = True
        trace = model.trace(tokens, keep)
        for layer in (0, 1):
            want = [replaced(ids.tolist(), keep[layer]) for ids in free.ids[layer]]
            np.testing.assert_array_equal(trace.ids[layer], want)
            assert all(len(set(ids)) == len(ids) for ids in want)
            np.testing.assert_allclose(trace.weights[layer].sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["deepseek2+grouped", "deepseek2+grouped-nobias", "deepseek2+grouped-softmax"])
def test_groups_that_hold_few_kept_experts_lose(make: Make, programs: Path, name: str) -> None:
    """A group is scored by its best two: with one kept expert it must not win and leave too few to choose from."""
    path = make(name)
    model = moeshard.Model(path, n_threads=1)
    tokens = np.random.default_rng(5).integers(0, model.n_vocab, 64, dtype=np.int32)
    keep = np.ones((model.n_layer, model.n_expert), dtype=bool)
    for layer, row in enumerate(keep):
        weak = layer % 4
        row[4 * weak : 4 * weak + 3] = False  # one left
        row[(4 * weak + 4) % 16 : (4 * weak + 4) % 16 + 2] = False  # two left
    stock = reference.stock(programs, path, [Run(tokens, keep)], threads=1)
    assert_same_bits(model.logits(tokens, keep), stock.logits, "logits")
    trace = model.trace(tokens, keep)
    np.testing.assert_array_equal(trace.ids, stock.ids)
    for i, layer in enumerate(trace.layers):
        assert keep[layer][trace.ids[i]].all()
        assert not (trace.ids[i] // 4 == layer % 4).any()


def test_random_model_has_a_flat_profile(make: Make) -> None:
    """Experts of a random router are alike; a trace that misreads the engine's tensors finds favourites."""
    model = moeshard.Model(make("qwen3moe+4096-tokens"), n_threads=1)
    rng = np.random.default_rng(11)
    chosen = np.zeros((len(model.moe_layers), model.n_expert))
    mass = np.zeros_like(chosen)
    n_tokens = 0
    while n_tokens < 10_000:
        trace = model.trace(rng.integers(0, model.n_vocab, 256))
        for layer in range(len(chosen)):
            chosen[layer] += np.bincount(trace.ids[layer].ravel(), minlength=model.n_expert)
            mass[layer] += np.bincount(trace.ids[layer].ravel(), trace.weights[layer].ravel(), model.n_expert)
        n_tokens += trace.ids.shape[1]
    for profile in (chosen, mass):
        assert (profile.max(axis=1) < 2 * profile.mean(axis=1)).all(), profile / profile.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(mass.sum(axis=1), n_tokens, rtol=1e-5)


TEXT = "The llama walked over the hill and saw a long road, a river and a town behind it. " * 12


@pytest.mark.parametrize(("name", "holds_weights"), [("llama4", True), ("qwen3moe", False), ("deepseek2", False)])
def test_what_experts_contribute_holds_their_weights_once(make: Make, name: str, holds_weights: bool) -> None:
    """Llama 4 weighs what goes into an expert: the norm of what comes out holds the weight already."""
    model = moeshard.Model(make(name), n_threads=1)
    profile = analyze(model, [Domain("text", (TEXT,))], window=32, n_tokens=32)
    (tokens,) = sequences(model, Domain("text", (TEXT,)), 32, 32)
    trace = model.trace(tokens, norms=True)
    assert trace.norms is not None and trace.weighs_inputs == holds_weights
    wide = trace.norms.astype(np.float64)
    contributions = wide if holds_weights else trace.weights * wide
    np.testing.assert_array_equal(trace.contributions(), contributions)
    assert not np.allclose(trace.weights, 1, atol=0.05)
    wanted = np.zeros((3, *profile.saliency.shape[1:]))
    for layer, (ids, own, weights) in enumerate(zip(trace.ids, contributions, trace.weights, strict=True)):
        for sums, values in zip(wanted, (own, own**2, weights), strict=True):
            np.add.at(sums[layer], ids.ravel(), values.ravel())
    for sums, found in zip(wanted, (profile.saliency, profile.energy, profile.mass), strict=True):
        # A profile holds them in half precision, energy by its square root.
        np.testing.assert_allclose(found[0], sums, rtol=2**-10 + 1e-5, atol=2**-23 * sums.max())
    keep = random_keep(np.random.default_rng(2), model.n_layer, model.n_expert, model.n_expert_used, 1)
    held = wanted[0] * keep[profile.layers]
    share = (held.sum(axis=1) / wanted[0].sum(axis=1)).mean()
    assert saliency_held(model, [keep], [tokens])[0, 0] == pytest.approx(share, rel=1e-4)
    whole, part = saliency(model, [keep], tokens)
    np.testing.assert_allclose(whole.sum(axis=1), wanted[0].sum(axis=1))
    np.testing.assert_allclose(part[0].sum(axis=1), held.sum(axis=1))


@pytest.mark.parametrize("name", ["glm4moe+nextn", "hy_v3+nextn", "step35+nextn", "ernie4_5-moe"])
def test_layers_that_route_no_token_do_not_count(make: Make, tmp_path: Path, name: str) -> None:
    """Blocks that predict further tokens, and a layer that the tiny ERNIE computes as a dense one."""
    model = moeshard.Model(make(name), n_threads=1)
    last = model.n_layer - 1
    assert last in GGUFMap(model.path).moe_layout().moe_layers and last not in model.computed_layers
    profile = analyze(model, [Domain("text", (TEXT,))], window=32)
    assert profile.layers.tolist() == model.computed_layers and profile.count.any(axis=2).all()
    everything = np.ones((model.n_layer, model.n_expert), dtype=bool)
    assert captured(profile, everything) == pytest.approx(1)
    tokens = model.tokenize(TEXT)[:32]
    assert saliency_held(model, [everything], [tokens])[0, 0] == pytest.approx(1)
    assert model.trace(tokens).layers == tuple(model.computed_layers)
    with pytest.raises(moeshard.MoeshardError, match=f"layer {last} "):
        analyze(model, [Domain("text", (TEXT,))], window=32, layers=[last])
    # All strategies hold the same there.
    half = model.n_expert // 2
    assert len({choose_experts(profile, [half], way)[0][last].tobytes() for way in ("islands", "ranked", "reap")}) == 1
    # Profiles made before this was known have a row of nothing, which counts no more.
    rows = {
        key: np.concatenate([getattr(profile, key), np.zeros_like(getattr(profile, key)[:, :1])], axis=1)
        for key in ("count", "mass", "saliency", "energy", "entropy", "peak", "together", "cosaliency")
    }
    old_file(tmp_path / "old.npz", replace(profile, layers=np.append(profile.layers, np.int32(last)), **rows), 2)
    old = read_profile(tmp_path / "old.npz")
    assert old.layers.tolist() == profile.layers.tolist()
    for key in rows:
        np.testing.assert_array_equal(getattr(old, key), getattr(profile, key))


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2+grouped", "gpt-oss"])
def test_exact_with_several_threads(make: Make, programs: Path, name: str) -> None:
    path = make(name)
    model = moeshard.Model(path, n_threads=3)
    rng = np.random.default_rng(13)
    tokens = rng.integers(0, model.n_vocab, 100, dtype=np.int32)
    keep = random_keep(rng, model.n_layer, model.n_expert, model.n_expert_used, model.routing.n_group)
    stock = reference.stock(programs, path, [Run(tokens, keep)], threads=3)
    assert_same_bits(model.logits(tokens, keep), stock.logits, "logits")


def test_the_reference_drops_nothing_by_itself(make: Make, programs: Path) -> None:
    """A keep of all experts changes no bit of stock llama.cpp, and a real one does."""
    path = make("deepseek2+grouped")
    model = moeshard.Model(path, n_threads=1)
    tokens = np.arange(64, dtype=np.int32)
    everything = np.ones((model.n_layer, model.n_expert), dtype=bool)
    some = random_keep(np.random.default_rng(1), model.n_layer, model.n_expert, model.n_expert_used, 4)
    plain = reference.stock(programs, path, [Run(tokens)], threads=1, watch=False)
    kept = reference.stock(programs, path, [Run(tokens, everything)], threads=1)
    dropped = reference.stock(programs, path, [Run(tokens, some)], threads=1)
    assert_same_bits(kept.logits, plain.logits, "stock keeping everything")
    assert not np.array_equal(dropped.logits, plain.logits)
