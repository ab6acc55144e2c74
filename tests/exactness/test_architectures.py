"""moeshard against stock llama.cpp, on a random model of every MoE architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reference
from compare import assert_alike, assert_same_bits, largest_difference, random_keep
from reference import Reference, Run
from specimens import NOT_CAUSAL, SPECIMENS

import moeshard

N_TOKENS = 48
THREADS = 1
# Of the largest logit. Batches of another size go through other matrix kernels, which sum in another order. Without a
# KV cache attention is computed over the other sequence too, in half precision; stock llama.cpp differs by as much.
ROUNDING = 2e-5
ROUNDING_NOT_CAUSAL = 5e-3


@dataclass
class Specimen:
    """A model file, opened by moeshard, with tokens and keeps to try on it."""

    name: str
    path: Path
    programs: Path
    model: moeshard.Model
    results: dict[str, str]

    def __post_init__(self) -> None:
        model = self.model
        rng = np.random.default_rng(7)
        self.tokens = rng.integers(0, model.n_vocab, N_TOKENS, dtype=np.int32)
        self.others = rng.integers(0, model.n_vocab, N_TOKENS, dtype=np.int32)
        shape = (model.n_layer, model.n_expert, model.n_expert_used, model.routing.n_group)
        self.keeps = [random_keep(rng, *shape) for _ in range(3)]

    def stock(self, *runs: Run, ubatch: int = 512, ctx: int = 0, watch: bool = True) -> Reference:
        return reference.stock(self.programs, self.path, runs, ubatch=ubatch, ctx=ctx, threads=THREADS, watch=watch)

    @contextmanager
    def result(self, column: str) -> Iterator[None]:
        """The column of the table that the block decides."""
        self.results[column] = "fails"
        yield
        self.results[column] = "exact"


@pytest.fixture(scope="module", params=SPECIMENS)
def specimen(
    request: pytest.FixtureRequest, make: Callable[[str], Path], programs: Path, table: dict[str, dict[str, str]]
) -> Iterator[Specimen]:
    path = make(request.param)
    results = table.setdefault(request.param, {})
    yield Specimen(request.param, path, programs, moeshard.Model(path, n_threads=THREADS), results)
    path.unlink()  # all of them together are half a gigabyte


def test_unmasked_logits(specimen: Specimen) -> None:
    with specimen.result("no mask"):
        stock = specimen.stock(Run(specimen.tokens), watch=False)
        assert np.isfinite(stock.logits).all()
        assert np.abs(stock.logits).max() > 0.01
        assert_same_bits(specimen.model.logits(specimen.tokens), stock.logits, "logits")
        watched = specimen.stock(Run(specimen.tokens))
        assert_same_bits(watched.logits, stock.logits, "stock under its own callback")


def test_masked_logits(specimen: Specimen) -> None:
    with specimen.result("masked"):
        plain = specimen.model.logits(specimen.tokens)
        for keep in specimen.keeps:
            stock = specimen.stock(Run(specimen.tokens, keep))
            for row, layer in enumerate(stock.layers):
                assert keep[layer][stock.ids[row]].all(), f"layer {layer}: the reference itself chose dropped experts"
            ours = specimen.model.logits(specimen.tokens, keep)
            assert_same_bits(ours, stock.logits, "logits")
            assert largest_difference(ours, plain) > 1e-4, "the mask changed nothing"
        assert_same_bits(specimen.model.logits(specimen.tokens), plain, "logits after masks were lifted")
        if specimen.name not in NOT_CAUSAL:
            small = moeshard.Model(specimen.path, n_threads=THREADS, n_ubatch=16)
            keep = specimen.keeps[0]
            stock = specimen.stock(Run(specimen.tokens, keep), ubatch=16)
            assert_same_bits(small.logits(specimen.tokens, keep), stock.logits, "logits in micro-batches of 16")


def check_trace(trace: moeshard.Trace, stock: Reference, keep: np.ndarray | None) -> None:
    assert tuple(trace.layers) == stock.layers
    np.testing.assert_array_equal(trace.ids, stock.ids)
    assert_same_bits(trace.weights, stock.weights, "weights")
    kept = np.ones(stock.probs.shape, dtype=bool)
    if keep is not None:
        kept &= keep[list(stock.layers)][:, None]
        for row, layer in enumerate(trace.layers):
            assert keep[layer][trace.ids[row]].all(), f"layer {layer}: a dropped expert was chosen"
    if trace.probs is not None:
        assert_same_bits(trace.probs[kept], stock.probs[kept], "router scores")
        assert np.isin(trace.probs[~kept], (0.0, -np.inf)).all()
    if trace.norms is not None:
        np.testing.assert_allclose(trace.norms, stock.norms, rtol=1e-6)


def test_trace(specimen: Specimen) -> None:
    with specimen.result("trace"):
        for keep in (None, specimen.keeps[0]):
            stock = specimen.stock(Run(specimen.tokens, keep))
            # In a context that has just computed without a trace or with another one: what the engine prepared for that
            # must not serve this.
            specimen.model.logits(specimen.tokens, keep)
            for wanted in ({}, {"probs": True}, {"norms": True}, {"probs": True, "norms": True}, {}):
                trace = specimen.model.trace(specimen.tokens, keep, **wanted)
                check_trace(trace, stock, keep)
                assert (trace.probs is not None, trace.norms is not None) == ("probs" in wanted, "norms" in wanted)


def test_two_masks_in_a_batch(specimen: Specimen) -> None:
    with specimen.result("two masks in a batch"):
        model, pairs = specimen.model, list(zip((specimen.tokens, specimen.others), specimen.keeps, strict=False))
        together = model.logits_batch([tokens for tokens, _ in pairs], [keep for _, keep in pairs])
        ids: list[list[np.ndarray]] = [[], []]
        with model.session(n_seq=2) as session:
            for seq, (_, keep) in enumerate(pairs):
                session.set_keep(keep, seq)

            def sink(chunk: moeshard.TraceChunk) -> None:
                for seq in range(2):
                    ids[seq].append(np.stack([layer.ids[chunk.seq == seq] for layer in chunk.layers]))

            session.trace({seq: tokens for seq, (tokens, _) in enumerate(pairs)}, sink)
        for seq, (tokens, keep) in enumerate(pairs):
            alone, own_ids = model.logits(tokens, keep), model.trace(tokens, keep).ids
            causal = specimen.name not in NOT_CAUSAL
            tolerance = ROUNDING if causal else ROUNDING_NOT_CAUSAL
            assert_alike(together[seq], alone, np.concatenate(ids[seq], axis=1), own_ids, tolerance, causal=causal)
        stock = specimen.stock(*(Run(tokens, keep) for tokens, keep in pairs), ctx=2 * 256)
        assert_same_bits(np.concatenate(together), stock.logits, "logits of both sequences")
