"""Proving that a shard is what it says: the source's own bytes, and the masked model's own logits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import moeshard._core as _core
from moeshard._core import GGUFMap, MoeshardError, SegmentList, ShardFacts
from moeshard.files.documents import expect, parse_document, take
from moeshard.gguf.corrections import NOTE, digest, open_corrections
from moeshard.gguf.fingerprint import fingerprint, same_fingerprint
from moeshard.keep.text import held_range
from moeshard.progress import Progress

if TYPE_CHECKING:
    from moeshard.shards.logits import LogitCheck


@dataclass(frozen=True)
class Verification:
    """A shard whose every byte was found to be the source's, or of a corrected tensor."""

    path: str
    kind: str
    bytes: int
    n_expert: int
    """Held per layer; by the layer that holds most."""
    n_expert_fewest: int
    """Held by the layer that holds fewest."""
    n_expert_source: int
    corrected: tuple[str, ...] = ()
    """Tensors that are not the source's but were corrected for the experts held: each is as its recovery made it."""
    logits: LogitCheck | None = None


def verify(
    shard: str | os.PathLike[str],
    source: str | os.PathLike[str] | GGUFMap,
    *,
    recovery: str | os.PathLike[str] | None = None,
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
        recovery: the file that the shard's corrected tensors came from, to compare them with it. Without it they are
            compared with the digests that the shard says they have.
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
    if logits and facts.kind != "shard":
        raise MoeshardError(f"{file.path}: logits need a whole shard, this is a file of kind '{facts.kind}'")
    corrected = tuple(_corrected(file, facts))
    if logits and corrected:
        raise MoeshardError(
            f"{file.path}: some of its tensors were corrected, so that it computes something else than the masked "
            f"model on purpose; leave logits out, and see what it loses with moeshard evaluate --shards"
        )
    _compare(file, lay_out_again(model, file, facts), model, facts, progress)
    _check_corrected(file, facts, recovery)
    fewest, most = held_range(facts.keep, facts.layers) if facts.kind != "trunk" else (0, 0)
    check = None
    if logits:
        from moeshard.shards.logits import compare_logits

        (one_file,) = lay_out_again(model, file, facts, max_file_size=0)
        check = compare_logits(file, model, facts, one_file, n_threads)
    size = sum(part.size for part in file.parts)
    return Verification(file.path, facts.kind, size, most, fewest, facts.n_expert, corrected, check)


def lay_out_again(
    model: GGUFMap, file: GGUFMap, facts: ShardFacts, *, max_file_size: int | None = None
) -> list[SegmentList]:
    """Return the segments of the files that `file` consists of, from the source and the shard's own facts.

    `max_file_size` asks for files of another size: 0 for one.
    """
    one_number, clamp = experts_used(file)
    largest = max(part.size for part in file.parts) if len(file.parts) > 1 else 0
    files = _core.shard_segments(
        model,
        facts.keep if facts.kind != "trunk" else None,
        kind=facts.kind,
        n_expert_used=one_number,
        clamp=clamp,
        per_layer=True,
        max_file_size=largest if max_file_size is None else max_file_size,
        with_router=facts.has_router,
        notes=facts.notes,
        # What was corrected is the shard's own; `verify` compares it with its digests.
        corrected=file,
        corrected_names=list(_corrected(file, facts)),
    )
    if max_file_size is None and len(files) != len(file.parts):
        raise MoeshardError(f"{file.path}: has {len(file.parts)} parts, but would be written as {len(files)}")
    return files


def _corrected(file: GGUFMap, facts: ShardFacts) -> dict[str, str]:
    """Return SHA-256 by name of the tensors that a shard says were corrected."""
    note = dict(facts.notes).get(NOTE)
    if note is None:
        return {}
    try:
        tensors = take(parse_document(note, "note"), "tensors", dict)
        return {name: expect(value, str, f"tensors.{name}") for name, value in tensors.items()}
    except MoeshardError as error:
        raise MoeshardError(
            f"{file.path}: what it says of corrected tensors cannot be read ({error}); the file is damaged, write it "
            f"again"
        ) from error


def _check_corrected(file: GGUFMap, facts: ShardFacts, recovery: str | os.PathLike[str] | None) -> None:
    stated = _corrected(file, facts)
    if recovery is not None:
        made = {name: digest(own.file, name) for own in [open_corrections(recovery)] for name in own.names}
        if made != stated:
            raise MoeshardError(f"{file.path}: its corrected tensors are not those of '{os.fspath(recovery)}'")
    for name, wanted in stated.items():
        if digest(file, name) != wanted:
            raise MoeshardError(
                f"{file.path}: corrected tensor '{name}' is not as it was written; write the shard again"
            )


def experts_used(file: GGUFMap) -> tuple[int, bool]:
    """Return how a shard was told to use other experts per token than its model: a number of them, or to clamp."""
    layout = file.moe_layout()
    if f"moeshard.source.{layout.arch}.expert_used_count" not in file.metadata:
        return 0, False
    used = {n for n in layout.n_expert_used if n > 0}
    # Layers that still use different numbers were not given one.
    return (used.pop(), False) if len(used) == 1 else (0, True)


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
