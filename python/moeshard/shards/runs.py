"""What a model does with some tokens under keeps, in the whole model's numbers: what a shard is compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeLayout
from moeshard.arrays import Floats, Ids, Tokens

if TYPE_CHECKING:
    from moeshard.keep.text import Keep
    from moeshard.runtime.model import Model
    from moeshard.runtime.trace import TraceChunk

# Short, since what follows a token that was sent to another expert is not compared.
N_SEQUENCES = 16
N_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """Sequences to run, each under a keep."""

    tokens: npt.NDArray[np.int32]
    """int32 (n_seq, length)."""
    keeps: npt.NDArray[np.bool_]
    """bool (n_seq, n_layer, n_expert) of the whole model."""


@dataclass(frozen=True)
class Run:
    """Axes are (MoE layer, token of a probe, …); the sequences follow each other. Experts have the numbers and columns
    of the whole model."""

    layers: tuple[int, ...]
    ids: Ids
    """int32 (n_layers, n_tokens, top_k): the chosen experts; -1 where a layer chooses fewer than the widest."""
    weights: Floats
    """float32 (n_layers, n_tokens, n_expert): of chosen experts, else NaN."""
    scores: Floats
    """float32 (n_layers, n_tokens, n_expert): the router's, of experts that may be chosen, else NaN."""
    norms: Floats
    """float32 (n_layers, n_tokens, n_expert): of the outputs of chosen experts, else NaN."""
    logits: Floats
    """float32 (n_tokens, n_vocab)."""
    length: int
    """Tokens of a sequence."""


def random_tokens(model: Model) -> Tokens:
    """Return int32 (n_seq, length) pseudo-random tokens, the same each time."""
    length = min(N_TOKENS, model.n_ctx_train or N_TOKENS)
    return np.random.default_rng(0).integers(0, model.n_vocab, (N_SEQUENCES, length), dtype=np.int32)


def nothing_to_choose(keep: Keep, layout: MoeLayout, used: list[int]) -> npt.NDArray[np.bool_] | None:
    """Return random parts of a keep, a keep for each sequence, that hold in each layer what a token uses and no more.

    Under them a router cannot choose another expert, however its scores are rounded. None where expert groups do not
    allow it.

    Args:
        keep: bool (n_layer, n_expert).
        layout: of the whole model.
        used: experts per token and layer; 0 where nothing is routed.
    """
    rng = np.random.default_rng(1)
    narrow = np.zeros((N_SEQUENCES, *keep.shape), dtype=bool)
    for layer in np.flatnonzero(used):
        held = rng.permutation(np.flatnonzero(keep[layer]))
        for i, sequence in enumerate(narrow):
            # Dealt in turn, so that as many as possible are in some sequence.
            chosen = _in_groups(np.roll(held, -i * used[layer]), used[layer], layout)
            if chosen is None:
                return None
            sequence[layer, chosen] = True
    return narrow


def _in_groups(held: npt.NDArray[np.intp], n_used: int, layout: MoeLayout) -> npt.NDArray[np.intp] | None:
    """Return the first of `held` that can be all that a token has to choose from."""
    if layout.n_expert_groups <= 1:
        return held[:n_used]
    # A group is scored by its best two: as many groups as are searched hold two or more, and no other does.
    group_of = held // (layout.n_expert // layout.n_expert_groups)
    full = [group for group in dict.fromkeys(group_of.tolist()) if (group_of == group).sum() >= 2]
    groups = full[: layout.n_expert_groups_used]
    if len(groups) < layout.n_expert_groups_used or n_used < 2 * len(groups):
        return None
    pairs = np.concatenate([held[group_of == group][:2] for group in groups])
    others = [expert for expert in held[np.isin(group_of, groups)] if expert not in pairs]
    chosen = np.concatenate([pairs, np.asarray(others[: n_used - len(pairs)], dtype=np.intp)])
    return chosen if len(chosen) == n_used else None


def run(model: Model, probe: Probe) -> Run:
    """Run a probe on the whole model, or on a part of it that holds what the keeps allow."""
    n_seq, length = probe.tokens.shape
    sequences = dict(enumerate(probe.tokens))
    layers = model.moe_layers
    n_expert = probe.keeps.shape[2]
    rows = (len(layers), n_seq * length)
    ids = np.full((*rows, model.n_expert_used), -1, dtype=np.int32)
    weights, scores, norms = (np.full((*rows, n_expert), np.nan, dtype=np.float32) for _ in range(3))
    index = {layer: i for i, layer in enumerate(layers)}
    seen = np.zeros(len(layers), dtype=bool)

    def sink(chunk: TraceChunk) -> None:
        at = chunk.seq * length + chunk.pos
        for part in chunk.layers:
            i = index[part.layer]
            seen[i] = True
            assert part.probs is not None and part.norms is not None
            held = model.expert_ids[part.layer]
            chosen = held[part.ids]
            ids[i, at, : chosen.shape[1]] = chosen
            weights[i, at[:, None], chosen] = part.weights
            norms[i, at[:, None], chosen] = part.norms
            n_held = int((held >= 0).sum())
            row = np.full((len(at), n_expert), np.nan, dtype=np.float32)
            row[:, held[:n_held]] = part.probs[:, :n_held]
            scores[i, at] = np.where(probe.keeps[chunk.seq, part.layer], row, np.nan)

    with model.session(n_seq=n_seq, n_ctx=length) as session:
        for seq, keep in enumerate(probe.keeps):
            session.set_keep(own_numbers(model, keep), seq)
        session.trace(sequences, sink, probs=True, norms=True)
        session.reset()
        logits = session.decode(sequences, "all")
    return Run(
        tuple(layer for layer, there in zip(layers, seen, strict=True) if there),
        ids[seen],
        weights[seen],
        scores[seen],
        norms[seen],
        np.concatenate([logits[seq] for seq in sequences]),
        length,
    )


def own_numbers(model: Model, keep: Keep) -> Keep:
    """Return a keep of the whole model as one of `model`, which holds a part of it."""
    own = np.ones((model.n_layer, model.n_expert), dtype=bool)
    for layer in model.moe_layers:
        held = model.expert_ids[layer]
        own[layer] = keep[layer, held] | (held < 0)
    return own
