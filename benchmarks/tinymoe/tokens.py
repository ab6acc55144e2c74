"""The tokenizer: byte-level BPE with GPT-2's splitting rule, which llama.cpp knows as `gpt-2`."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOT = "<|endoftext|>"

#: Characters per domain that the merges are learned from: every domain alike, or small ones get no tokens.
_SAMPLE_CHARS = 1_500_000


def train_tokenizer(pieces: dict[str, list[str]], vocabulary: int) -> Tokenizer:
    """Learn at most `vocabulary` tokens (256 bytes and end-of-text among them) from a sample per domain."""

    def sample() -> Iterator[str]:
        for domain, texts in pieces.items():
            shuffled = random.Random(domain).sample(texts, len(texts))
            size = 0
            for text in shuffled:
                if size < _SAMPLE_CHARS:
                    size += len(text)
                    yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer
