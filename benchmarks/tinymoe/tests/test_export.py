"""Every shape, exported and run by llama.cpp: the same tokens, the same logits as in torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tinymoe.config import CONFIGS
from tinymoe.export import read, write
from tinymoe.model import Model

from .conftest import TEXT

engine = pytest.importorskip("tinymoe.engine")


def random_model(name: str) -> Model:
    """Not as it starts training: norms, biases and routers that matter, so that a mistake shows."""
    torch.manual_seed(1)
    model = Model(replace(CONFIGS[name], vocab=512)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
        for router in model.routers():
            router.router.mul_(4)
            router.down.mul_(8)
            if router.bias is not None:
                router.bias.uniform_(-0.2, 0.2)
    return model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_equal_torch(name: str, tokenizer_file: Path, tmp_path: Path) -> None:
    model = random_model(name)
    path = tmp_path / "model.gguf"
    write(model, tokenizer_file, path, "f32", name)
    tokens = torch.randint(1, 512, (150,))
    with torch.no_grad():
        expected = model(tokens[None])[0].numpy()
    found = engine.Engine(path).logits(tokens.numpy())
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_file_reads_back_as_the_model(name: str, tokenizer_file: Path, tmp_path: Path) -> None:
    model = random_model(name)
    write(model, tokenizer_file, tmp_path / "model.gguf", "f32", name)
    again = read(tmp_path / "model.gguf", model.c).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_other_types_load(name: str, kind: str, tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(random_model(name), tokenizer_file, path, kind, name)
    assert np.isfinite(engine.Engine(path).logits(np.arange(1, 50))).all()


def test_llama_cpp_splits_text_as_the_tokenizer_does(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write(random_model("tinymoe-mixtral"), tokenizer_file, path, "q8_0", "m")
    judge = engine.Engine(path)
    odd = ["\n\n\n  x\t\t y \r\n", "naïve 漢字 🙂 ½", "I'll we've 12345 a_b::c<d>", "<|endoftext|"]
    for text in [*TEXT.values(), *odd]:
        ids = judge.tokenize(text.encode())
        assert ids == tokenizer.encode(text).ids
        assert judge.detokenize(ids).decode() == text
