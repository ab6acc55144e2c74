"""The recovery of one node: its layers corrected one after the other, each in the stream of those before it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moeshard._core import GGUFMap, MoeshardError
from moeshard.gguf.corrections import open_corrections, write_corrections
from moeshard.gguf.identity import ModelIdentity
from moeshard.keep.text import Keep
from moeshard.recovery.layer import (
    DOWN,
    GAIN,
    RIDGES,
    Fitted,
    Projections,
    fit_layer,
    foreign_corrections,
    harmless,
    read_projections,
)
from moeshard.recovery.moments import Matrix, Moments, Sample
from moeshard.recovery.streams import Lack, Streams, Text

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

SOURCE = "source"
SAMPLE_TOKENS = 16384
PARTIAL = ".partial"


@dataclass(frozen=True)
class Settings:
    """What decides how a recovery comes out, beside the text."""

    parts: tuple[str, ...] = (DOWN, GAIN)
    passes: int | None = None
    """Blocks of layers that are corrected one after the other; None: a block for each layer."""
    ridges: tuple[float, ...] = RIDGES
    kind: str = SOURCE
    """ggml's name of the type of corrected projections; `SOURCE`: as the model has them."""


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer, on the text that was held out."""

    layer: int
    before: float
    """Squared distance of the shard's stream after the layer from the whole model's, relative to that, when all layers
    before it were corrected."""
    after: float
    """The same with the layer corrected, in its type: measured, not predicted."""
    ridge: float | None
    corrected: bool
    """False where the correction did not help and was not taken."""


@dataclass
class NodeRecovery:
    """What is known of a node so far."""

    tensors: list[tuple[str, str, tuple[int, ...], bytes]] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)

    def take(self, fitted: Fitted) -> None:
        self.tensors.append((fitted.name, fitted.type, fitted.shape, fitted.bytes))

    def drop(self, name: str) -> None:
        self.tensors = [tensor for tensor in self.tensors if tensor[0] != name]


@dataclass(frozen=True, eq=False)
class NodeTask:
    """A node to be recovered, and where to."""

    name: str
    keep: Keep
    n_expert_used: int | None
    fit: tuple[Text, Text]
    """Two parts of different domains; the second may be empty."""
    judge: tuple[Text, Text]
    path: str
    facts: dict[str, Any]
    """What the file says of how it was made; a partial one is gone on with only where all of it is the same."""


class NodeFit:
    """Corrects a node's layers, block by block, and keeps what is done in a partial file."""

    def __init__(self, whole: Model, model: GGUFMap, identity: ModelIdentity, streams: Streams, settings: Settings):
        self._whole, self._model, self._identity = whole, model, identity
        self._streams, self._settings = streams, settings

    def run(
        self, task: NodeTask, *, resume: bool, force: bool, progress: Callable[[str, float], object]
    ) -> NodeRecovery:
        """Correct all layers of a node and write its file.

        Raises:
            MoeshardError: see `moeshard.recovery.recover.recover`.
        """
        partial = task.path + PARTIAL
        done = self._resumed(task, partial) if resume and os.path.exists(partial) else NodeRecovery()
        blocks = blocks_of(self._whole.computed_layers, self._settings.passes)
        for index, block in enumerate(blocks):
            if block[0] in {report.layer for report in done.layers}:
                continue
            span = f"layer {block[0]}" if len(block) == 1 else f"layers {block[0]}-{block[-1]}"

            def step(part: float, index: int = index, span: str = span) -> None:
                progress(f"{task.name}: {span}", (index + part) / len(blocks))

            self._block(task, block, done, partial, step)
            self._write(task, done, partial, force=True)
        self._write(task, done, task.path, force=force)
        with suppress(OSError):
            os.unlink(partial)
        return done

    def _block(
        self, task: NodeTask, block: Sequence[int], done: NodeRecovery, partial: str, step: Callable[[float], object]
    ) -> None:
        own = {
            layer: read_projections(self._model, layer, np.flatnonzero(task.keep[layer]).tolist()) for layer in block
        }
        scales = {layer: projections.scale for layer, projections in own.items()}
        total = sum(map(len, task.fit)) + 2 * sum(map(len, task.judge))
        read = 0

        def lacks_of(shard: Model, text: Text) -> Iterator[Lack]:
            nonlocal read
            for number, lacks in self._streams.read(shard, text, block, scales):
                yield from lacks
                read += number
                step(read / total)

        moments = {layer: self._moments(own[layer]) for layer in block}
        alone: dict[int, dict[float, Matrix]] = {layer: {} for layer in block}
        samples = {layer: Sample(SAMPLE_TOKENS) for layer in block}
        foreign = {layer: Sample(SAMPLE_TOKENS) for layer in block}
        before = dict.fromkeys(block, 0.0)
        shard = self._shard(task, done, partial)
        for place, text in enumerate(task.fit):
            for lack in lacks_of(shard, text):
                self._check(lack, own[lack.layer])
                moments[lack.layer].add(lack.ids, lack.features, lack.target, lack.earlier)
            if place == 0 and len(task.judge[1]) and DOWN in self._settings.parts and len(self._settings.ridges) > 1:
                alone = {layer: foreign_corrections(moments[layer], self._settings.ridges) for layer in block}
        for place, text in enumerate(task.judge):
            for lack in lacks_of(shard, text):
                # No part takes the other's room.
                samples[lack.layer].most = SAMPLE_TOKENS // (2 if place == 0 and len(task.judge[1]) else 1)
                samples[lack.layer].add(lack.ids, lack.features, lack.target, lack.earlier)
                if place == 1:
                    foreign[lack.layer].add(lack.ids, lack.features, lack.target)
                before[lack.layer] += squares(lack)
        shard.close()
        allowed = {
            layer: harmless(alone[layer], foreign[layer]) if alone[layer] else list(self._settings.ridges)
            for layer in block
        }

        ridges = self._fit_block(block, own, moments, samples, allowed, done)
        after = dict(before)
        if ridges:
            self._write(task, done, partial, force=True)
            corrected = self._shard(task, done, partial)
            after = dict.fromkeys(block, 0.0)
            for text in task.judge:
                for lack in lacks_of(corrected, text):
                    after[lack.layer] += squares(lack)
            corrected.close()
        unit = sum(text.n_tokens for text in task.judge)
        for layer in block:
            helps = layer in ridges and after[layer] < before[layer]
            if layer in ridges and not helps:
                done.drop(own[layer].name)
            done.layers.append(
                LayerReport(
                    layer, before[layer] / unit, after[layer] / unit, ridges.get(layer) if helps else None, helps
                )
            )

    def _fit_block(
        self,
        block: Sequence[int],
        own: dict[int, Projections],
        moments: dict[int, Moments],
        samples: dict[int, Sample],
        allowed: dict[int, list[float]],
        done: NodeRecovery,
    ) -> dict[int, float | None]:
        """Fit the layers of a block, and return the ridges of those that are corrected."""
        removed = 0.0
        ridges: dict[int, float | None] = {}
        for layer in block:
            moments[layer].close(removed)
            samples[layer].close(removed)
            kind = own[layer].type if self._settings.kind == SOURCE else self._settings.kind
            fitted = fit_layer(
                own[layer],
                moments.pop(layer),
                samples[layer],
                parts=self._settings.parts,
                kind=kind,
                ridges=allowed[layer],
            )
            if fitted is None:
                removed = 0.0
                continue
            removed = fitted.explained
            ridges[layer] = fitted.ridge
            done.take(fitted)
        return ridges

    def _moments(self, own: Projections) -> Moments:
        n_expert, n_embd, n_ff = own.values.shape
        return Moments(n_expert, n_ff, n_embd)

    def _check(self, lack: Lack, own: Projections) -> None:
        if own.values.shape[1:] != (lack.target.shape[1], lack.features.shape[2]):
            raise MoeshardError(
                f"{self._model.path}: layer {lack.layer}: what its experts give does not go into the residual stream "
                f"as it is on this architecture, so they cannot be fitted to it"
            )

    def _shard(self, task: NodeTask, done: NodeRecovery, partial: str) -> Model:
        from moeshard.runtime.model import Model

        return Model(
            self._model.path,
            keep=task.keep,
            n_expert_used=task.n_expert_used,
            recovery=partial if done.tensors else None,
            **self._whole.load_options,
        )

    def _write(self, task: NodeTask, done: NodeRecovery, path: str, *, force: bool) -> None:
        layers = [asdict(report) for report in done.layers]
        facts = {**task.facts, "layers": layers}
        write_corrections(path, self._identity, task.keep, done.tensors, facts, force=force)

    def _resumed(self, task: NodeTask, partial: str) -> NodeRecovery:
        found = open_corrections(partial)
        found.check(self._identity, task.keep, task.n_expert_used)
        same = ("node", "parts", "ridges", "passes", "type", "window", "windows", "prompt", "texts")
        for key in same:
            if found.document.get(key) != task.facts.get(key):
                raise MoeshardError(
                    f"{partial}: was begun with another '{key}'; go on with the same options, or begin anew without "
                    f"--resume (resume=False)"
                )
        tensors = [
            (info.name, info.type, tuple(info.shape), np.ascontiguousarray(found.file.tensors[info.name]).tobytes())
            for info in found.file.tensor_infos
        ]
        layers = [LayerReport(**report) for report in found.document["layers"]]
        finished = {f"blk.{report.layer}." for report in layers}
        return NodeRecovery([one for one in tensors if one[0].startswith(tuple(finished))], layers)


def squares(lack: Lack) -> float:
    """Return the sum over tokens of the squared lack, relative to the whole model's stream."""
    return float(np.square(lack.target, dtype=np.float64).mean(axis=1).sum())


def blocks_of(layers: Sequence[int], passes: int | None) -> list[list[int]]:
    """Divide layers into blocks of neighbours, as many as there are passes, or one for each layer."""
    number = len(layers) if passes is None else max(1, min(passes, len(layers)))
    return [[int(layer) for layer in block] for block in np.array_split(np.array(layers), number)]
