"""A shard in a llama.cpp that has nothing to do with this project: that of the wheel `xllamacpp`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from shard_files import Gguf, gb

import moeshard
from moeshard.gguf.identity import identify

N_TOKENS = 24
# Between log probabilities of two versions of llama.cpp, built for different processors: they sum in other orders. With
# weights in F32 up to 0.002 was measured. With Q8_0 activations are quantised too, so that a last bit becomes a step
# or, where two experts are nearly tied, another expert: 0.025 at the 90th percentile. The whole model is 3 away.
CLOSE_F32 = 0.01
CLOSE_Q8 = 0.06
PROMPTS = (
    "The package manager of Debian",
    "int main(int argc, char",
    "def __init__(self",
    "Der Benutzer kann",
    "Les paquets",
)

# In a process of its own: two copies of llama.cpp in one are not what anybody would do.
SCRIPT = """
import json, sys
import xllamacpp

path, n_tokens, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx = 512
params.n_parallel = 1
params.n_gpu_layers = 0
params.cpuparams.n_threads = 1
params.warmup = False
server = xllamacpp.Server(params)
for prompt in prompts:
    request = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "logprobs": 10, "cache_prompt": False}
    print(json.dumps(server.handle_completions(request)))
"""


def complete(path: Path) -> list[dict[str, Any]]:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed: pip install '.[test]'")
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # of sanitizers
    command = [sys.executable, "-c", SCRIPT, str(path), str(N_TOKENS), json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def in_f32(model: Path, out: Path) -> Path:
    """Write the model with all of its weights in F32."""
    whole = moeshard.GGUFMap(model)
    data = model.read_bytes()
    g = Gguf(entries=[data[at : at + size] for at, size in whole.parts[0].entry_ranges.values()])
    for tensor in gguf.GGUFReader(model).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        ne = tuple(int(n) for n in tensor.shape)
        g.tensors.append(gb.Tensor(tensor.name.encode(), ne, 0, values.tobytes()))
    with out.open("wb") as file:  # build() is for files of less than a MiB
        for piece in [g.header(), *(tensor.data for tensor in g.tensors)]:
            file.write(piece + bytes(-len(piece) % g.alignment))
    return out


class Comparison:
    """What the other engine said of a shard, beside this one under a keep: a row per token that it generated."""

    def __init__(self, model: moeshard.Model, answers: list[dict[str, Any]]):
        self.model = model
        self.steps = [answer["choices"][0]["logprobs"]["content"] for answer in answers]
        self.prompts = [model.tokenize(prompt, parse=True) for prompt in PROMPTS]
        assert [len(steps) for steps in self.steps] == [N_TOKENS] * len(PROMPTS)
        for prompt, steps, answer in zip(self.prompts, self.steps, answers, strict=True):
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            assert model.detokenize([step["id"] for step in steps]) == answer["choices"][0]["text"]

    def differences(self, keep: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float64]:
        """Per token, the largest among its ten likeliest."""
        return np.array([np.abs(ours - theirs).max() for ours, theirs, _ in self._rows(keep)])

    def same_choice(self, keep: npt.NDArray[np.bool_]) -> float:
        """Return the share of tokens that are the likeliest here too."""
        return float(np.mean([is_likeliest for _, _, is_likeliest in self._rows(keep)]))

    def _rows(self, keep: npt.NDArray[np.bool_] | None) -> Iterator[tuple[Any, Any, bool]]:
        for prompt, steps in zip(self.prompts, self.steps, strict=True):
            text = np.concatenate([prompt, [step["id"] for step in steps[:-1]]])
            rows = log_softmax(self.model.logits(text, keep))[len(prompt) - 1 :]
            for row, step in zip(rows, steps, strict=True):
                ids = [candidate["id"] for candidate in step["top_logprobs"]]
                yield row[ids], np.array([c["logprob"] for c in step["top_logprobs"]]), row.argmax() == step["id"]


@pytest.mark.parametrize("n_keep", [64, 32])
@pytest.mark.parametrize("kind", ["q8_0", "f32"])
def test_greedy_continuations_and_their_probabilities(kind: str, n_keep: int, tinymoe: Path, tmp_path: Path) -> None:
    source = tinymoe if kind == "q8_0" else in_f32(tinymoe, tmp_path / "f32.gguf")
    model = moeshard.Model(source, n_threads=1)
    rng = np.random.default_rng(n_keep)
    keep = np.zeros((model.n_layer, model.n_expert), dtype=bool)
    for row in keep:
        row[rng.choice(model.n_expert, n_keep, replace=False)] = True
    moeshard.split(source, keep, tmp_path / "shard.gguf")

    found = Comparison(model, complete(tmp_path / "shard.gguf"))
    differences = found.differences(keep)
    if kind == "f32":
        # The two round keys and values otherwise, so that a near tie of the routers falls the other way now and then.
        assert np.quantile(differences, 0.95) < CLOSE_F32
        assert found.same_choice(keep) > 0.98
    else:
        assert np.quantile(differences, 0.9) < CLOSE_Q8
        assert found.same_choice(keep) > 0.95
    assert np.median(found.differences(None)) > 10 * CLOSE_Q8, "the shard is like the whole model"


def test_a_corrected_shard(tinymoe: Path, tmp_path: Path) -> None:
    keep = np.zeros((5, 128), dtype=bool)
    keep[:, ::4] = True
    plan = moeshard.Plan([moeshard.PlanNode("quarter", keep)], "custom", {}, identify(moeshard.GGUFMap(tinymoe)))
    texts = moeshard.embedded_traffic("calibration")[2:3]
    options = {"n_windows": 16, "window": 64, "passes": 1, "ridge": 0.1}
    (made,) = moeshard.recover(tinymoe, plan, tmp_path, texts, **options)  # type: ignore[arg-type]
    (shard,) = moeshard.split(tinymoe, plan, tmp_path / "shards", recovery=tmp_path)

    answers = complete(Path(shard.paths[0]))
    found = Comparison(moeshard.Model(tinymoe, keep=keep, recovery=made.path, n_threads=1), answers)
    differences = found.differences(None)
    assert np.quantile(differences, 0.9) < CLOSE_Q8
    as_it_was = Comparison(moeshard.Model(tinymoe, keep=keep, n_threads=1), answers).differences(None)
    assert np.median(as_it_was) > 10 * np.median(differences), "nothing was corrected"
