"""Shards of models whose experts are quantised: every family of types that llama.cpp writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from compare import random_partition
from sharding import Whole

# fmt: off
TYPES = (
    "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq4_nl", "iq4_xs",
    "tq1_0", "tq2_0", "mxfp4", "nvfp4",
)
# fmt: on
# Sigmoid gating, and a softmax over the chosen experts only: nothing depends on dropped ones.
CASES = [("deepseek2+wide", kind) for kind in TYPES] + [("gpt-oss", kind) for kind in ("mxfp4", "q8_0", "bf16")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_quantised_shards_are_exact(
    name: str, kind: str, make: Callable[..., Path], programs: Path, tmp_path: Path
) -> None:
    whole = Whole(name, make, programs, tmp_path, experts=kind)
    assert whole.exact
    slabs = [whole.map.tensor_infos[t.index] for t in whole.layout.tensors if t.role == "slab"]
    assert {info.type for info in slabs} == {kind}
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    assert {(info.shape[-1] % block, info.row_bytes) for info in slabs} == {
        (0, info.shape[-1] // block * size) for info in slabs
    }
    for keep in random_partition(np.random.default_rng(23), whole.layout.n_layer, whole.layout.n_expert, 2):
        whole.check(keep)
    whole.path.unlink()
