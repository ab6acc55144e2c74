"""The routing trace: which experts each token was sent to, with what weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard.arrays import Floats, Ids


@dataclass(frozen=True)
class LayerChunk:
    """One MoE layer of a :class:`TraceChunk`; one row per token."""

    layer: int
    ids: Ids
    """int32 (n_tokens, top_k): the chosen experts, in the model's order."""
    weights: Floats
    """float32 (n_tokens, top_k): the weights of their outputs."""
    probs: Floats | None
    """float32 (n_tokens, n_expert), or None where not asked for."""
    norms: Floats | None
    """float32 (n_tokens, top_k), or None where not asked for."""


@dataclass(frozen=True)
class TraceChunk:
    """What one micro-batch did. The arrays own the memory that the engine wrote; nothing was copied in Python."""

    seq: Ids
    """int32 (n_tokens,): the sequence of each token."""
    pos: Ids
    """int32 (n_tokens,): its position in that sequence."""
    layers: tuple[LayerChunk, ...]


@dataclass(frozen=True)
class Trace:
    """The routing of a text; axes are (MoE layer, token, …). Layers that choose fewer experts than the widest one are
    padded with id -1 and weight 0."""

    layers: tuple[int, ...]
    """The model's layer behind each index of the first axis."""
    ids: Ids
    """int32 (len(layers), n_tokens, top_k): the chosen experts, in the model's order."""
    weights: Floats
    """float32 (len(layers), n_tokens, top_k): what each chosen expert's output is multiplied by (for Llama 4, its
    input)."""
    probs: Floats | None = None
    """float32 (len(layers), n_tokens, n_expert): the router's scores after the gating function. Probabilities that sum
    to 1 where it is a softmax over all experts; independent scores where it is elementwise (sigmoid, sqrt-softplus);
    the logits where the softmax is taken after the selection. A dropped expert has 0 (-inf among logits)."""
    norms: Floats | None = None
    """float32 (len(layers), n_tokens, top_k): the L2 norm of each chosen expert's output before it is weighted."""


ChunkSink = Callable[[TraceChunk], None]


def chunk_sink(sink: ChunkSink) -> Callable[..., None]:
    """Adapt `sink` to what the native core calls."""

    def receive(seq: Ids, pos: Ids, layers: list[tuple[Any, ...]]) -> None:
        sink(TraceChunk(seq, pos, tuple(LayerChunk(*layer) for layer in layers)))

    return receive


class TraceBuilder:
    """Collects the chunks of one sequence into a :class:`Trace`."""

    def __init__(self, layers: list[int], n_tokens: int, n_used: int, n_expert: int, *, probs: bool, norms: bool):
        rows = (len(layers), n_tokens)
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._seen = np.zeros(rows, dtype=bool)
        self._trace = Trace(
            tuple(layers),
            np.full((*rows, n_used), -1, dtype=np.int32),
            np.zeros((*rows, n_used), dtype=np.float32),
            np.zeros((*rows, n_expert), dtype=np.float32) if probs else None,
            np.zeros((*rows, n_used), dtype=np.float32) if norms else None,
        )

    def add(self, chunk: TraceChunk) -> None:
        first, last = int(chunk.pos[0]), int(chunk.pos[-1])
        where: slice | Ids = chunk.pos
        if last - first + 1 == len(chunk.pos) and bool((np.diff(chunk.pos) == 1).all()):
            where = slice(first, last + 1)
        for layer in chunk.layers:
            i = self._index.get(layer.layer)
            if i is None:
                continue
            k = layer.ids.shape[1]
            self._seen[i, where] = True
            self._trace.ids[i, where, :k] = layer.ids
            self._trace.weights[i, where, :k] = layer.weights
            if self._trace.probs is not None and layer.probs is not None:
                self._trace.probs[i, where] = layer.probs
            if self._trace.norms is not None and layer.norms is not None:
                self._trace.norms[i, where, :k] = layer.norms

    def build(self) -> Trace:
        """Return the trace without the layers that were never computed (next-token-prediction blocks)."""
        ran: npt.NDArray[np.bool_] = np.asarray(self._seen.any(axis=1))
        if bool(ran.all()):
            return self._trace
        trace = self._trace
        return Trace(
            tuple(layer for layer, there in zip(trace.layers, ran, strict=True) if there),
            trace.ids[ran],
            trace.weights[ran],
            None if trace.probs is None else trace.probs[ran],
            None if trace.norms is None else trace.norms[ran],
        )
