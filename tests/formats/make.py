"""Write one file of every format that this version writes, for later versions to read.

    python tests/formats/make.py tests/formats/VERSION

Run once per release. The files are committed and never made again: see README.md here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import gguf
import numpy as np
from format_readers import READERS, last_logits, open_models

import moeshard
from moeshard import Domain

N_EMBD, N_EXPERT, N_FF, N_LAYER, N_USED = 32, 8, 32, 3, 2
DOMAINS = {"letters": "abcdefghij ", "digits": "0123456789+", "signs": "<>()[]{};,."}
END = "<|end|>"


def byte_tokens() -> list[str]:
    """A token per byte, as byte-level BPE spells them: printable ones as themselves, the others from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    other = iter(range(256))
    return [chr(byte) if byte in plain else chr(256 + next(other)) for byte in range(256)]


def write_model(path: Path) -> None:
    """A random qwen3moe small enough to be kept, the same on every machine.

    In float32: half-precision weights make llama.cpp round activations, which tips routers that are nearly undecided.
    """
    rng = np.random.default_rng(20261125)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_name("formats")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF * N_USED)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_USED)
    tokens = [*byte_tokens(), "Ġa", END]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["Ġ a"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)

    def random(name: str, *shape: int, scale: float = 1.0) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) * scale).astype(np.float32))

    def ones(name: str, n: int) -> None:
        writer.add_tensor(name, np.ones(n, dtype=np.float32))

    random("token_embd.weight", len(tokens), N_EMBD)
    random("output.weight", len(tokens), N_EMBD, scale=0.3)
    ones("output_norm.weight", N_EMBD)
    for layer in range(N_LAYER):
        block = f"blk.{layer}."
        for name, n in {"attn_norm": N_EMBD, "ffn_norm": N_EMBD, "attn_q_norm": 32, "attn_k_norm": 32}.items():
            ones(f"{block}{name}.weight", n)
        for name, rows, columns in (
            ("attn_q", 64, N_EMBD),
            ("attn_k", 32, N_EMBD),
            ("attn_v", 32, N_EMBD),
            ("attn_output", N_EMBD, 64),
        ):
            random(f"{block}{name}.weight", rows, columns, scale=columns**-0.5)
        random(f"{block}ffn_gate_inp.weight", N_EXPERT, N_EMBD, scale=2 * N_EMBD**-0.5)
        random(f"{block}ffn_gate_exps.weight", N_EXPERT, N_FF, N_EMBD, scale=N_EMBD**-0.5)
        random(f"{block}ffn_up_exps.weight", N_EXPERT, N_FF, N_EMBD, scale=N_EMBD**-0.5)
        random(f"{block}ffn_down_exps.weight", N_EXPERT, N_EMBD, N_FF, scale=3 * N_FF**-0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def traffic(part: int) -> list[Domain]:
    """Two texts of each domain; those of two parts have nothing in common but their alphabets."""
    rng = np.random.default_rng(part)
    return [
        Domain(name, tuple("".join(rng.choice(list(alphabet), 200)) for _ in range(2)))
        for name, alphabet in DOMAINS.items()
    ]


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    os.chdir(out)  # so that no file holds a path of this machine
    write_model(Path("model.gguf"))
    model = moeshard.Model("model.gguf", n_threads=1)

    profile = moeshard.analyze(model, traffic(0), window=50)
    profile.facts["seconds"] = 1.0  # the only thing that would differ from run to run
    profile.save("profile.npz")
    moeshard.write_ranking("ranking.csv", profile.ranking(), model.moe_layers)

    plan = moeshard.make_plan(model.path, profile, n_keep=[3, 4])
    plan.model.facts["path"] = "model.gguf"
    plan.write("plan.json")
    unequal = moeshard.make_plan(model.path, profile, n_keep=[4], strategy="ranked", per_layer=True, n_expert_used=1)
    unequal.model.facts["path"] = "model.gguf"
    unequal.write("plan-per-layer.json")
    length: dict[str, int] = {"n_windows": 4, "window": 40, "n_prompt": 16, "resamples": 200}
    moeshard.evaluate(model, "plan.json", traffic(1), n_answers=2, n_tokens=12, **length).save("evaluation.json")
    moeshard.measure_curve(
        model, profile, traffic(1), sizes=[2, 4, 8], strategies=["ranked", "contiguous"], **length
    ).save("curve.json")

    first, second = (node.keep for node in plan.nodes)
    steps = np.zeros((N_LAYER, N_EXPERT), dtype=bool)
    for layer, size in enumerate((2, 4, 6)):
        steps[layer, layer : layer + size] = True
    Path("keep.txt").write_text(moeshard.format_keep(steps))
    moeshard.split(model.path, first, "shard.gguf")
    moeshard.split(model.path, second, "clamped.gguf", n_expert_used=1)
    moeshard.split(model.path, steps, "per-layer.gguf", per_layer=True)
    moeshard.split(model.path, first, "parts.gguf", max_file_size=150_000)
    moeshard.split(model.path, plan, "once", trunk_once=True)

    here = Path()
    expected = {name: read(here) for name, read in READERS.items()}
    logits = {name: last_logits(opened) for name, opened in open_models(here).items()}
    Path("expected.json").write_text(json.dumps(expected | {"logits": logits}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
