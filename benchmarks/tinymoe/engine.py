"""llama.cpp by its Python package `llama-cpp-python`: the judge that shares no code with the training."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

_GGML_TYPE_F32 = 0


class Engine:
    """A GGUF in llama.cpp on the CPU; keys and values in F32, no flash attention, so that only the file rounds.

    One thread: more would wait for each other at every operation, which is slow where others compute too.
    """

    def __init__(self, path: Path, context: int = 512, threads: int = 1) -> None:
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, n_threads=threads,
            n_threads_batch=threads, type_k=_GGML_TYPE_F32, type_v=_GGML_TYPE_F32, flash_attn=False, verbose=False,
            n_gpu_layers=0, seed=0,
        )  # fmt: skip

    def tokenize(self, text: bytes) -> list[int]:
        return self.llama.tokenize(text, add_bos=False, special=False)

    def detokenize(self, tokens: list[int]) -> bytes:
        return self.llama.detokenize(tokens)

    def logits(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits (T, V) of one sequence (T,), from an empty context."""
        self.llama.reset()
        self.llama.eval(tokens.tolist())
        return self.llama.scores[: len(tokens)].copy()

    def sample(self, prompt: bytes, tokens: int, temperature: float, seed: int) -> bytes:
        """`prompt` and a continuation, drawn from the whole distribution (no top-k, no top-p)."""
        start = self.tokenize(prompt)
        self.llama.set_seed(seed)
        self.llama.reset()
        out: list[int] = []
        for token in self.llama.generate(start, top_k=0, top_p=1.0, min_p=0.0, temp=temperature):
            if token == self.llama.token_eos() or len(out) == tokens:
                break
            out.append(token)
        return self.detokenize(start + out)
