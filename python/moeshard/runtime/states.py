"""What layers compute on the way: residual streams, inputs of routers, activations of the chosen experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import moeshard._core as _core
from moeshard.arrays import Floats, Ids, Tokens
from moeshard.runtime.trace import LayerChunk, TraceChunk, chunk_sink


@dataclass(frozen=True)
class LayerStates:
    """One layer that routes, for the n tokens of some sequences, one sequence after the other."""

    layer: int
    ids: Ids
    """int32 (n, top_k): the chosen experts."""
    weights: Floats
    """float32 (n, top_k): what their outputs are multiplied by."""
    inputs: Floats
    """float32 (n, n_embd): what the router sees."""
    hidden: Floats
    """float32 (n, top_k, n_ff): what each chosen expert's down projection is applied to."""
    residual: Floats
    """float32 (n, n_embd): the residual stream after the layer."""
    scaled: bool
    """Whether the down projections' outputs are multiplied by ``ffn_down_exps.scale``, where there is one."""


class StateReader:
    """Reads inner states, some layers at a time. Nothing behind the last layer that is wanted is computed."""

    def __init__(self, context: _core.Context):
        self._context = context

    @property
    def n_seq(self) -> int:
        """Sequences that can be read at once."""
        return self._context.n_seq_max

    def read(self, sequences: Sequence[Tokens], layers: Sequence[int]) -> list[LayerStates]:
        """Return the states of these layers (ascending, of those that route) for some sequences.

        Raises:
            MoeshardError: this architecture computes something on the way that is not known how to read.
        """
        chunks: list[TraceChunk] = []
        self._context.reset()
        # Sequences of unlike length may be cut into micro-batches anyhow: each token has its place.
        starts = np.cumsum([0, *(len(tokens) for tokens in sequences)])
        self._context.trace(
            list(enumerate(sequences)), chunk_sink(chunks.append), states=list(layers), probs=False, norms=False
        )
        if len(chunks) == 1 and len(sequences) == 1:
            return [_states(layer) for layer in chunks[0].layers]
        order = np.concatenate([starts[chunk.seq] + chunk.pos for chunk in chunks]).argsort()
        return [
            _states(_join([chunk.layers[index] for chunk in chunks], order)) for index in range(len(chunks[0].layers))
        ]


def _join(parts: list[LayerChunk], order: np.ndarray[tuple[int], np.dtype[np.intp]]) -> LayerChunk:
    def rows(name: str) -> Floats:
        joined: Floats = np.concatenate([getattr(part, name) for part in parts])[order]
        return joined

    return LayerChunk(
        parts[0].layer,
        np.concatenate([part.ids for part in parts])[order],
        rows("weights"),
        None,
        None,
        rows("inputs"),
        rows("hidden"),
        rows("residual"),
        parts[0].scaled,
    )


def _states(chunk: LayerChunk) -> LayerStates:
    assert chunk.inputs is not None and chunk.hidden is not None and chunk.residual is not None
    return LayerStates(chunk.layer, chunk.ids, chunk.weights, chunk.inputs, chunk.hidden, chunk.residual, chunk.scaled)
