"""Proving that a shard is what it says: the source's own bytes, and the masked model's own logits."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeshardError, SegmentList, ShardFacts
from moeshard.gguf.fingerprint import fingerprint, same_fingerprint
from moeshard.keep.text import held_range
from moeshard.progress import Progress

# Of the largest logit. Without some experts, sums are made in another order (a softmax over fewer numbers, a product
# with fewer rows), which changes last bits. That alone is 2e-6, but KV caches are in half precision, and what experts
# read is rounded as their weights are: there a last bit can move a number by a whole step. Another expert is more.
ROUNDING = 5e-3
ROUNDING_QUANTISED = 6e-2
LOGIT_TOKENS = 128


@dataclass(frozen=True)
class LogitCheck:
    """A shard beside the whole model under its keep, on the same tokens."""

    n_tokens: int
    largest_difference: float
    """Of the largest absolute logit; 0: bit for bit."""
    allowed: float
    same_choice: float
    """Share of the tokens for which both find the same next token likeliest."""

    @property
    def agrees(self) -> bool:
        return self.largest_difference <= self.allowed


@dataclass(frozen=True)
class Verification:
    """A shard whose every byte was found to be the source's."""

    path: str
    kind: str
    bytes: int
    n_expert: int
    """Held per layer; by the layer that holds most."""
    n_expert_fewest: int
    """Held by the layer that holds fewest."""
    n_expert_source: int
    logits: LogitCheck | None = None


def verify(
    shard: str | os.PathLike[str],
    source: str | os.PathLike[str] | GGUFMap,
    *,
    logits: bool = False,
    n_threads: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Compare a shard (or trunk, or file of experts) with the model it was taken from.

    The shard is laid out anew from the source and from what it says it holds, and compared byte for byte: header,
    every tensor, padding.

    Args:
        shard: any part of it, if there are several.
        source: the whole model.
        logits: also run both on some tokens: the shard must give what the whole model gives under the shard's keep.
        n_threads: for `logits`; 0 for as many as the processors this process may use.
        progress: called with the bytes compared and those of the whole.

    Raises:
        MoeshardError: naming the first tensor and expert that differ, or why the two cannot belong together.
    """
    file = GGUFMap(shard)
    facts = _core.shard_facts(file)
    if facts is None:
        raise MoeshardError(f"{file.path}: is not a shard: it does not say which experts it holds; nothing to verify")
    model = source if isinstance(source, GGUFMap) else GGUFMap(source)
    notes = dict(facts.notes)
    if not same_fingerprint(notes.get("fingerprint", ""), fingerprint(model)):
        raise MoeshardError(f"{file.path}: was not taken from {model.path}: their fingerprints differ")
    _compare(file, lay_out_again(model, file, facts), model, facts, progress)
    fewest, most = held_range(facts.keep, facts.layers) if facts.kind != "trunk" else (0, 0)
    check = None
    if logits:
        if facts.kind != "shard":
            raise MoeshardError(f"{file.path}: logits need a whole shard, this is a file of kind '{facts.kind}'")
        check = compare_logits(file, model, facts, n_threads)
    size = sum(part.size for part in file.parts)
    return Verification(file.path, facts.kind, size, most, fewest, facts.n_expert, check)


def lay_out_again(model: GGUFMap, file: GGUFMap, facts: ShardFacts) -> list[SegmentList]:
    """Return the segments of the files that `file` consists of, from the source and the shard's own facts."""
    used_key = f"{file.moe_layout().arch}.expert_used_count"
    changed = f"moeshard.source.{used_key}" in file.metadata
    used = int(np.max(file.metadata[used_key])) if changed else 0
    files = _core.shard_segments(
        model,
        facts.keep if facts.kind != "trunk" else None,
        kind=facts.kind,
        n_expert_used=used,
        per_layer=True,
        max_file_size=max(part.size for part in file.parts) if len(file.parts) > 1 else 0,
        notes=facts.notes,
    )
    if len(files) != len(file.parts):
        raise MoeshardError(f"{file.path}: has {len(file.parts)} parts, but would be written as {len(files)}")
    return files


def compare_logits(file: GGUFMap, source: GGUFMap, facts: ShardFacts, n_threads: int) -> LogitCheck:
    """Run the shard, and the whole model under the shard's keep, on the same pseudo-random tokens."""
    from moeshard.runtime.model import Model

    shard = Model(file.path, n_threads=n_threads)
    n_tokens = min(LOGIT_TOKENS, shard.n_ctx_train or LOGIT_TOKENS)
    tokens = np.random.default_rng(0).integers(0, shard.n_vocab, n_tokens, dtype=np.int32)
    ours = shard.logits(tokens)
    used = facts_used(file)
    whole = Model(source.path, n_threads=n_threads, n_expert_used=used)
    theirs = whole.logits(tokens, facts.keep)
    scale = float(np.abs(theirs).max())
    return LogitCheck(
        n_tokens=n_tokens,
        largest_difference=float(np.abs(ours - theirs).max()) / scale if scale > 0 else 0.0,
        allowed=_allowed(source),
        same_choice=float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
    )


def _allowed(source: GGUFMap) -> float:
    """Return how far apart the logits may be, of the largest."""
    quantised = any(info.type not in ("f32", "f16", "bf16") for info in source.tensor_infos)
    return ROUNDING_QUANTISED if quantised else ROUNDING


def facts_used(file: GGUFMap) -> int | None:
    """Return the experts per token that the shard asks for where that is not what its model does."""
    key = f"{file.moe_layout().arch}.expert_used_count"
    return int(np.max(file.metadata[key])) if f"moeshard.source.{key}" in file.metadata else None


def _compare(
    file: GGUFMap, files: list[SegmentList], model: GGUFMap, facts: ShardFacts, progress: Progress | None
) -> None:
    total = sum(segments.size for segments in files)
    done = 0
    for index, (segments, part) in enumerate(zip(files, file.parts, strict=True)):
        begin = done

        def step(n: int, _: int, begin: int = begin) -> None:
            if progress is not None:
                progress(begin + n, total)

        at = _core.first_difference(segments, part.path, progress=step)
        if at is not None:
            raise MoeshardError(f"{part.path}: {_place(file, index, at, facts)} differs from {model.path}")
        done += segments.size


def _place(file: GGUFMap, part: int, offset: int, facts: ShardFacts) -> str:
    """Say what lies at a byte of a shard."""
    experts = {tensor.index: tensor for tensor in file.moe_layout().tensors}
    for index, info in enumerate(file.tensor_infos):
        if info.part != part or not info.offset <= offset < info.offset + info.nbytes:
            continue
        place = f"byte {offset - info.offset} of tensor '{info.name}'"
        expert = experts.get(index)
        if expert is None or expert.axis < 0:
            return place
        number = (offset - info.offset) // expert.slice_bytes
        if expert.role == "chunk_slab":
            return f"{place} (chunk {number})"
        source = int(np.flatnonzero(facts.keep[expert.layer])[number])
        return f"{place} (expert {source} of the model)"
    return f"byte {offset}, in the header or between tensors,"
