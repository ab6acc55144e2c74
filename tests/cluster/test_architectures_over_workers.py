"""Every kind of attention, state and gating over two workers: the logits of one machine, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from worker_process import Worker

from moeshard import Model

sys.path.insert(0, str(Path(__file__).parents[1] / "exactness"))

import reference

ARCHITECTURES = {
    "llama": "softmax over the chosen ones",
    "qwen3moe": "softmax over all",
    "olmoe": "softmax, not normalised",
    "deepseek2": "latent attention, sigmoid, groups",
    "deepseek4": "hash tables, sqrt-softplus",
    "glm4moe": "sigmoid with a selection bias, a block that predicts further tokens",
    "gpt-oss": "attention sinks, biases of experts",
    "gemma4": "sliding windows",
    "llama4": "weights before the experts, attention in chunks",
    "qwen3next": "linear attention",
    "nemotron_h_moe": "states, experts of some layers only",
    "lfm2moe": "short convolutions",
    "granitehybrid": "states beside attention",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_one_machine(name: str, three: list[Worker], tmp_path: Path) -> None:
    path = tmp_path / f"{name}.gguf"
    assert reference.make_model(reference.programs(), name, path, None) == 0
    local = Model(path, n_threads=1)
    tokens = np.arange(3, 43)
    with Model(path, rpc=[worker.endpoint for worker in three[:2]], n_threads=1) as model:
        np.testing.assert_array_equal(model.logits(tokens), local.logits(tokens))
