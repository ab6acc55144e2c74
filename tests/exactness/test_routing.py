"""Routing rules that need more than one comparison: hash-routed layers, expert groups, statistics, threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
from compare import assert_same_bits, random_keep
from reference import Run

import moeshard

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
