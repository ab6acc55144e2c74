"""The routing trace: which experts each token was sent to, with what weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError, Routing
from moeshard.arrays import Floats, Ids
from moeshard.keep.text import format_ids


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
    inputs: Floats | None = None
    hidden: Floats | None = None
    residual: Floats | None = None
    scaled: bool = False
    """See `moeshard.runtime.states.LayerStates`; None where not asked for."""


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
    weighs_inputs: bool = False
    """The weights were applied to the inputs (Llama 4), so that `norms` hold them."""

    def contributions(self) -> npt.NDArray[np.float64]:
        """Return float64 (len(layers), n_tokens, top_k): the norm of what each chosen expert adds to its token.

        Weight times norm, or the norm where it holds the weight. Raises MoeshardError for a trace without norms.
        """
        if self.norms is None:
            raise MoeshardError("what experts contribute needs their norms; ask for them: trace(…, norms=True)")
        norms = self.norms.astype(np.float64)
        return norms if self.weighs_inputs else self.weights * norms


ChunkSink = Callable[[TraceChunk], None]


def chunk_sink(sink: ChunkSink) -> Callable[..., None]:
    """Adapt `sink` to what the native core calls."""

    def receive(seq: Ids, pos: Ids, layers: list[tuple[Any, ...]]) -> None:
        sink(TraceChunk(seq, pos, tuple(LayerChunk(*layer) for layer in layers)))

    return receive


class TraceBuilder:
    """Collects the chunks of one sequence into a :class:`Trace`."""

    def __init__(self, routing: Routing, n_tokens: int, n_used: int, *, probs: bool, norms: bool):
        layers = routing.moe_layers
        rows = (len(layers), n_tokens)
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._seen = np.zeros(rows, dtype=bool)
        self._trace = Trace(
            tuple(layers),
            np.full((*rows, n_used), -1, dtype=np.int32),
            np.zeros((*rows, n_used), dtype=np.float32),
            np.zeros((*rows, routing.n_expert), dtype=np.float32) if probs else None,
            np.zeros((*rows, n_used), dtype=np.float32) if norms else None,
            routing.weighs_inputs,
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
        """Return the trace without the layers that were never computed; see `Model.computed_layers`."""
        ran: npt.NDArray[np.bool_] = np.asarray(self._seen.any(axis=1))
        trace = self._trace
        if bool(ran.all()):
            return trace
        return replace(
            trace,
            layers=tuple(layer for layer, there in zip(trace.layers, ran, strict=True) if there),
            ids=trace.ids[ran],
            weights=trace.weights[ran],
            probs=None if trace.probs is None else trace.probs[ran],
            norms=None if trace.norms is None else trace.norms[ran],
        )


def check_finite(path: str, layer: int, experts: npt.NDArray[np.integer]) -> None:
    """Raise a `MoeshardError` where experts, ascending ids, gave outputs that are not finite.

    Called layer by layer: the first one is where it began. They cannot be left out: through the residual stream such an
    output is in all that the model computes after it.
    """
    if experts.size:
        named = f"expert {experts[0]}" if experts.size == 1 else f"experts {format_ids(experts)}"
        raise MoeshardError(
            f"{path}: layer {layer}, {named}: outputs that are not finite (NaN or infinity); nothing after them can be "
            f"measured. The file is damaged, or was converted with values that its type cannot hold: get or convert it "
            f"again"
        )
