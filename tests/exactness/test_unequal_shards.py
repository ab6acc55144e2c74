"""Shards whose layers hold different numbers of experts, of every MoE architecture: what the masked whole model
computes. Stock llama.cpp refuses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from compare import Keep, assert_alike, assert_same_bits, largest_difference
from sharding import AS_RUN, THREADS, Whole
from specimens import NOT_CAUSAL, SPECIMENS

import moeshard
from moeshard import _core

Make = Callable[..., Path]
N_USED = 4
MULTIPLE_OF_KERNEL = (4, 8, 12, 16)


def unequal_keep(layout: moeshard.MoeLayout, seed: int = 3, sizes: tuple[int, ...] = MULTIPLE_OF_KERNEL) -> Keep:
    """Random experts, of another number in each layer than in the one before."""
    rng = np.random.default_rng(seed)
    keep = np.ones((layout.n_layer, layout.n_expert), dtype=bool)
    for i, layer in enumerate(layout.moe_layers):
        keep[layer] = False
        keep[layer, rng.choice(layout.n_expert, sizes[i % len(sizes)], replace=False)] = True
    return keep


@dataclass
class Loaded:
    """A shard of a keep, loaded from its file."""

    whole: Whole
    keep: Keep
    path: Path

    def __post_init__(self) -> None:
        segments = _core.shard_segments(self.whole.map, self.keep, per_layer=True)
        self.path.unlink(missing_ok=True)
        _core.write_segments(segments, [self.path])
        self.model = moeshard.Model(self.path, n_threads=THREADS)

    def check(self, mask: Keep | None = None) -> None:
        """Compare with the whole model, both under a mask (n_layer, n_expert) of the whole model if one is given."""
        whole, keep = self.whole, self.keep if mask is None else self.keep & mask
        own = None if mask is None else self.own_mask(mask)
        logits, masked = self.model.logits(whole.tokens, own), whole.model.logits(whole.tokens, keep)
        trace = self.model.trace(whole.tokens, own, probs=True, norms=True)
        expected = whole.model.trace(whole.tokens, keep, probs=True, norms=True)
        ids = np.stack([self.model.expert_ids[layer][trace.ids[i]] for i, layer in enumerate(trace.layers)])
        compared = len(ids) if whole.exact else 1
        np.testing.assert_array_equal(ids[:compared], expected.ids[:compared])
        assert trace.probs is not None and expected.probs is not None
        for i, layer in enumerate(trace.layers[:compared]):
            held = np.flatnonzero(self.keep[layer])
            np.testing.assert_allclose(trace.probs[i, :, : held.size], expected.probs[i][:, held], rtol=1e-5, atol=1e-7)
            assert np.isin(trace.probs[i, :, held.size :], (0, -np.inf)).all(), "of experts that the layer has not"
        if whole.exact:
            assert_same_bits(logits, masked, "logits")
            assert_same_bits(trace.weights, expected.weights, "weights")
        else:
            assert_alike(logits, masked, ids, expected.ids, AS_RUN, causal=whole.name not in NOT_CAUSAL)

    def own_mask(self, mask: Keep) -> Keep:
        """The mask in the shard's numbers; experts that a layer does not have carry no meaning."""
        own = np.ones((self.model.n_layer, self.model.n_expert), dtype=bool)
        for layer in self.model.moe_layers:
            held = np.flatnonzero(self.keep[layer])
            own[layer, : held.size] = mask[layer, held]
        return own


@pytest.mark.parametrize("name", SPECIMENS)
def test_per_layer_shards(name: str, make: Make, programs: Path, tmp_path: Path) -> None:
    whole = Whole(name, make, programs, tmp_path)
    layout = whole.layout
    keep = unequal_keep(layout)
    if layout.n_expert_groups > 1 or layout.hash_layers or any(t.role == "chunk_slab" for t in layout.tensors):
        why = "groups of experts" if layout.n_expert_groups > 1 else "by token id" if layout.hash_layers else "chunk"
        with pytest.raises(moeshard.MoeshardError, match=rf"layer \d+ keeps 4 .*{why}.*--balance"):
            _core.shard_segments(whole.map, keep, per_layer=True)
        return
    shard = Loaded(whole, keep, tmp_path / "shard.gguf")
    counts = [int(keep[layer].sum()) if layer in layout.moe_layers else 0 for layer in range(layout.n_layer)]
    assert shard.model.layout.expert_counts == counts
    routed = shard.model.moe_layers
    assert [shard.model.routing.expert_counts[layer] for layer in routed] == [counts[layer] for layer in routed]
    assert shard.model.n_expert == max(counts)

    shard.check()
    streamed = moeshard.Model(whole.path, keep=keep, n_threads=THREADS)
    assert_same_bits(streamed.logits(whole.tokens), shard.model.logits(whole.tokens), "logits of the streamed shard")
    # Masks on a shard, of which each sequence has its own.
    narrow = keep.copy()
    for layer in layout.moe_layers:
        held = np.flatnonzero(keep[layer])
        narrow[layer, held[: held.size - N_USED]] = False
    shard.check(narrow)

    if len(routed) > 1:  # else all layers hold equally many
        with pytest.raises(RuntimeError, match=r"wrong shape; expected .*got"):
            whole.stock(shard.path)

    rest = ~keep
    rest[[layer for layer in layout.moe_layers if rest[layer].sum() < N_USED]] = True
    (others,) = _core.shard_segments(whole.map, rest, per_layer=True)
    other = whole.write(others, "others")
    (merged,) = _core.merge_segments([_core.GGUFMap(shard.path), _core.GGUFMap(other)])
    assert _core.first_difference(merged, whole.path) is None


@pytest.mark.parametrize("name", ["deepseek2", "gpt-oss", "llama4", "qwen3moe"])
def test_any_numbers_of_experts(name: str, make: Make, programs: Path, tmp_path: Path) -> None:
    """Also those for which llama.cpp multiplies the router's matrix by another kernel."""
    whole = Whole(name, make, programs, tmp_path)
    for seed, sizes in enumerate([(5, 16), (7, 4, 13), (9, 10, 11)]):
        keep = unequal_keep(whole.layout, seed, sizes)
        shard = Loaded(whole, keep, tmp_path / f"{seed}.gguf")
        assert largest_difference(shard.model.logits(whole.tokens), whole.model.logits(whole.tokens, keep)) < AS_RUN


def test_two_masks_in_a_batch(make: Make, programs: Path, tmp_path: Path) -> None:
    whole = Whole("deepseek2", make, programs, tmp_path)
    shard = Loaded(whole, unequal_keep(whole.layout, sizes=(12, 8, 16)), tmp_path / "shard.gguf").model
    masks = np.ones((2, shard.n_layer, shard.n_expert), dtype=bool)
    masks[0, :, :2] = masks[1, :, 3:7] = False
    alone = [shard.logits(whole.tokens, mask) for mask in masks]
    with shard.session(2) as session:
        for seq, mask in enumerate(masks):
            session.set_keep(mask, seq)
        together = session.decode(dict.fromkeys(range(2), whole.tokens), outputs="all")
    for seq, logits in together.items():
        assert largest_difference(logits, alone[seq]) < AS_RUN
    few = masks[0].copy()
    few[shard.moe_layers[0], : shard.routing.expert_counts[shard.moe_layers[0]] - N_USED + 1] = False
    with pytest.raises(moeshard.MoeshardError, match="keeps 3 experts, but the model routes each token to 4"):
        shard.logits(whole.tokens, few)


def test_a_layer_takes_the_memory_of_its_experts(make: Make, programs: Path, tmp_path: Path) -> None:
    whole = Whole("qwen3moe", make, programs, tmp_path)
    keep = unequal_keep(whole.layout)
    one = whole.layout.per_expert_bytes
    router = 4 * int(whole.map.metadata["qwen3moe.embedding_length"])
    dropped = sum((one[layer] + router) * int((~keep[layer]).sum()) for layer in whole.layout.moe_layers)
    for model in (moeshard.Model(whole.path, keep=keep), Loaded(whole, keep, tmp_path / "shard.gguf").model):
        assert whole.model._native.n_bytes - model._native.n_bytes == dropped
        context = _core.Context(model._native, n_ctx=256)
        assert context.memory[0] == pytest.approx(model._native.n_bytes, rel=0.02)


def test_verify_compares_logits(make: Make, programs: Path, tmp_path: Path) -> None:
    whole = Whole("deepseek2", make, programs, tmp_path)
    (shard,) = moeshard.split(whole.path, unequal_keep(whole.layout), tmp_path / "shard.gguf", per_layer=True)
    found = moeshard.verify(shard.paths[0], whole.path, logits=True, n_threads=THREADS)
    assert found.logits is not None and found.logits.largest_difference == 0
    assert (found.n_expert_fewest, found.n_expert) == (shard.n_expert_fewest, shard.n_expert) == (4, 8)
