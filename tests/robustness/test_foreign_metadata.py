"""Metadata as other programs write it: what llama.cpp runs is read, and what it throws is an error of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli

import moeshard
from moeshard import GGUFMap, Model, MoeshardError
from moeshard.gguf.identity import identify
from moeshard.gguf.inspection import inspect_model

sys.path.insert(0, str(Path(__file__).parents[1] / "gguf"))

import gguf_bytes as gb
from other_metadata import entry, with_entries

TOKENS = np.arange(20)
NAME = b"mod\xe8le"  # Latin-1


def logits(path: Path) -> np.ndarray:
    return Model(path, n_ctx=64, n_threads=1).logits(TOKENS)


def test_numbers_that_the_engine_does_not_stumble_over(tinymoe: Path, tmp_path: Path) -> None:
    foreign = [
        entry("qwen3moe.kda.gate_lower_bound", gb.F32, -np.inf),  # llama.cpp writes it into every file that it saves
        entry("some.tool.score", gb.F32, np.nan),
        entry("some.tool.epsilon", gb.F64, -1.0),
        entry("some.tool.rope.freq_base", gb.F32, 0.0),
        entry("qwen3moe.expert_weights_scale", gb.F64, np.inf),
    ]
    path = with_entries(tinymoe, tmp_path / "saved.gguf", foreign)
    np.testing.assert_array_equal(logits(path), logits(tinymoe))


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf])
def test_numbers_that_abort_the_engine(value: float, tinymoe: Path, tmp_path: Path) -> None:
    key = "qwen3moe.attention.layer_norm_rms_epsilon"
    path = with_entries(tinymoe, tmp_path / "damaged.gguf", [entry(key, gb.F32, value)])
    with pytest.raises(MoeshardError, match=f"damaged.gguf: {key} is .*the file is damaged"):
        Model(path)


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latin")
    entries = [entry("general.name", gb.STRING, NAME), entry("general.tags", gb.STRING, [NAME])]
    return with_entries(moeshard.embedded_model(), folder / "latin.gguf", entries)


def test_text_that_is_no_utf8_is_kept(latin: Path, tmp_path: Path) -> None:
    metadata = GGUFMap(latin).metadata
    assert metadata["general.name"].encode("utf-8", "surrogateescape") == NAME
    assert [tag.encode("utf-8", "surrogateescape") for tag in metadata["general.tags"]] == [NAME]
    moeshard.split(latin, ["0-63", "64-127"], tmp_path)
    shards = [tmp_path / f"latin.group-{i}.gguf" for i in range(2)]
    for shard in shards:
        moeshard.verify(shard, latin)
    moeshard.merge(shards, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == latin.read_bytes()


def test_text_that_is_no_utf8_is_shown(latin: Path, cli: Cli) -> None:
    shown = cli("inspect", latin)
    assert shown.code == 0 and "mod\\xe8le, " in shown.out
    assert json.loads(cli("inspect", latin, "--json").out)["name"] == "mod\\xe8le"
    assert identify(GGUFMap(latin)).name == "mod\ufffdle"
    ran = cli("generate", latin, "-p", "a", "-n", "1", "--threads", "1")
    assert ran.code == 0, ran.err


def test_architecture_that_is_no_text(tinymoe: Path, tmp_path: Path) -> None:
    path = with_entries(tinymoe, tmp_path / "odd.gguf", [entry("general.architecture", gb.STRING, b"qwen\xff")])
    for what in (inspect_model, Model):
        with pytest.raises(MoeshardError, match=r"qwen\\xff"):
            what(path)


def test_facts_of_a_shard_that_are_no_text(tinymoe: Path, tmp_path: Path) -> None:
    moeshard.split(tinymoe, "0-63", tmp_path / "shard.gguf")
    odd = with_entries(
        tmp_path / "shard.gguf", tmp_path / "odd.gguf", [entry("moeshard.fingerprint", gb.STRING, b"\xff")]
    )
    with pytest.raises(MoeshardError, match="odd.gguf: moeshard.fingerprint .*damaged"):
        moeshard.verify(odd, tinymoe)


# What the engine throws


@pytest.fixture(scope="module")
def no_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary lacks the pieces that unknown characters are made of."""
    source = moeshard.embedded_model()
    n_vocab = len(GGUFMap(source).metadata["tokenizer.ggml.tokens"])
    entries = [
        entry("tokenizer.ggml.model", gb.STRING, "llama"),
        entry("tokenizer.ggml.tokens", gb.STRING, [f"<word{i}>" for i in range(n_vocab)]),
        entry("tokenizer.ggml.scores", gb.F32, [0.0] * n_vocab),
        entry("tokenizer.ggml.token_type", gb.I32, [1] * n_vocab),
    ]
    return with_entries(source, tmp_path_factory.mktemp("vocabulary") / "no_bytes.gguf", entries)


def test_what_the_tokenizer_throws(no_bytes: Path, cli: Cli) -> None:
    model = Model(no_bytes, n_ctx=64, n_threads=1)
    with pytest.raises(MoeshardError, match="no_bytes.gguf: the text could not be tokenized"):
        model.tokenize("ü")
    assert np.isfinite(model.logits(TOKENS)).all()
    failed = cli("generate", no_bytes, "-p", "ü", "-n", "1", "--threads", "1")
    assert failed.code == 1 and "could not be tokenized" in failed.err


def test_what_bindings_raise_stays(tinymoe: Path) -> None:
    model = Model(tinymoe, n_ctx=64, n_threads=1)
    with pytest.raises(TypeError):
        model._native.tokenize(1)
    with pytest.raises(KeyError):
        GGUFMap(tinymoe).metadata["none"]


def test_numbers_of_experts_per_token_that_the_engine_computes_wrongly(tinymoe: Path, tmp_path: Path) -> None:
    key = "qwen3moe.expert_used_count"
    same = with_entries(tinymoe, tmp_path / "same.gguf", [entry(key, gb.U32, [8] * 5)])
    np.testing.assert_array_equal(logits(same), logits(tinymoe))
    path = with_entries(tinymoe, tmp_path / "differ.gguf", [entry(key, gb.U32, [8, 8, 4, 8, 8])])
    with pytest.raises(MoeshardError, match=f"differ.gguf: {key} is 4 in layer 2 and 8 in layer 0: .*'qwen3moe'"):
        Model(path)
