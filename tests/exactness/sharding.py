"""Shards in stock llama.cpp against the masked whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import reference
from compare import Keep, assert_alike, assert_same_bits
from reference import Reference, Run
from specimens import NOT_CAUSAL

import moeshard
from moeshard import _core

N_TOKENS = 48
THREADS = 1

# All of the largest logit. A softmax over fewer numbers sums in another order, which changes last bits.
ROUNDING = 2e-6
# So does the product that makes the router's scores: a matrix whose number of rows, here experts, is a multiple of 4
# goes through another kernel than others.
ROWS_OF_KERNEL = 4
# llama.cpp looks GELU up in a table of half-precision numbers, so that a last bit may choose another entry.
GELU = {"gemma4": 2e-3, "grok": 1e-5}
# By default the KV cache is in half precision, and what goes into an expert is rounded as its weights are. There too a
# last bit may round the other way. Up to 1e-3 was measured (experts in F16).
AS_RUN = 5e-3


def whole_ids(shard: Reference, keep: Keep) -> npt.NDArray[np.int32]:
    """The experts that a shard chose, which numbers those that it holds, in the numbers of the whole model."""
    return np.stack([np.flatnonzero(keep[layer])[shard.ids[row]] for row, layer in enumerate(shard.layers)])


def assert_same_experts(shard: Reference, masked_ids: npt.NDArray[np.int32], keep: Keep, n_layers: int) -> None:
    """The first `n_layers` MoE layers chose the same."""
    for row, chosen in enumerate(whole_ids(shard, keep)[:n_layers]):
        np.testing.assert_array_equal(chosen, masked_ids[row], err_msg=f"experts of layer {shard.layers[row]}")


@dataclass
class Whole:
    """A model of which shards are made. `make` gives its file, with experts in another type if wanted."""

    name: str
    make: Callable[..., Path]
    programs: Path
    folder: Path
    experts: str | None = None
    seed: int = 7
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.make(self.name, self.experts)
        self.map = _core.GGUFMap(self.path)
        self.layout = self.map.moe_layout()
        self.model = moeshard.Model(self.path, n_threads=THREADS)
        self.tokens = np.random.default_rng(self.seed).integers(0, self.model.n_vocab, N_TOKENS, dtype=np.int32)

    @property
    def exact(self) -> bool:
        """Whether no kept expert's score depends on the experts that were dropped."""
        return bool(self.layout.gating != "softmax")

    @property
    def tolerance(self) -> float:
        """How far logits may be apart in single precision."""
        return GELU.get(self.name.partition("+")[0], ROUNDING)

    def segments(self, keep: Keep, path: Path | None = None) -> _core.SegmentList:
        (segments,) = _core.shard_segments(self.map if path is None else _core.GGUFMap(path), keep)
        return segments

    def stock(self, path: Path, keep: Keep | None = None, *, single: bool = False) -> Reference:
        return reference.stock(self.programs, path, [Run(self.tokens, keep)], threads=THREADS, single=single)

    def write(self, segments: _core.SegmentList, name: str = "shard") -> Path:
        path = self.folder / f"{name}.gguf"
        _core.write_segments([segments], [path], force=True)
        assert _core.first_difference(segments, path) is None
        return path

    def check(self, keep: Keep) -> None:
        """Compare the shard that holds `keep`."""
        shard = self.stock(self.write(self.segments(keep)))
        trace = self.model.trace(self.tokens, keep, norms=True)
        assert tuple(trace.layers) == shard.layers
        logits = self.model.logits(self.tokens, keep)
        streamed = moeshard.Model(self.path, keep=keep, n_threads=THREADS)
        assert_same_bits(streamed.logits(self.tokens), shard.logits, "logits of the streamed shard")
        n_keep = int(keep[trace.layers[0]].sum())
        if self.exact and n_keep % ROWS_OF_KERNEL == self.layout.n_expert % ROWS_OF_KERNEL == 0:
            assert_same_experts(shard, trace.ids, keep, len(trace.layers))
            assert_same_bits(trace.weights, shard.weights, "weights")
            assert_same_bits(logits, shard.logits, "logits")
            return
        # What the first layer reads does not depend on the keep, so this sees its experts as they are in the file.
        assert trace.norms is not None
        assert_same_experts(shard, trace.ids, keep, 1)
        if self.layout.selection != "logits":  # Llama 4 weights what an expert reads
            np.testing.assert_allclose(shard.norms[0], trace.norms[0], rtol=1e-6)
        np.testing.assert_allclose(shard.weights[0], trace.weights[0], rtol=1e-5)
        self.assert_alike(shard, logits, trace.ids, keep, AS_RUN)
        self.check_in_single_precision(keep)

    def check_in_single_precision(self, keep: Keep) -> None:
        """Compare with nothing rounded to less on the way, but with the mask that stock llama.cpp can apply to itself.

        test_architectures.py shows that it is moeshard's.
        """
        path = self.make(self.name, "f32")
        masked = self.stock(path, keep, single=True)
        shard = self.stock(self.write(self.segments(keep, path)), single=True)
        self.assert_alike(shard, masked.logits, masked.ids, keep, self.tolerance)

    def assert_alike(
        self,
        shard: Reference,
        logits: npt.NDArray[np.float32],
        ids: npt.NDArray[np.int32],
        keep: Keep,
        tolerance: float,
    ) -> None:
        """A shard has the masked model's logits, as far as both chose the same experts."""
        causal = self.name not in NOT_CAUSAL
        assert_alike(shard.logits, logits, whole_ids(shard, keep), ids, tolerance, causal=causal)
