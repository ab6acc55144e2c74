"""Several sequences in one context, each with its own keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeshard.arrays import TokensLike
from moeshard.runtime.trace import ChunkSink, chunk_sink

if TYPE_CHECKING:
    from moeshard.keep.text import KeepSpec
    from moeshard.runtime.contexts import Lease


@dataclass(frozen=True)
class Statistics:
    """Sums over the tokens of S sequences in M layers of E experts; see `moeshard.profile.record.Profile`."""

    count: npt.NDArray[np.int32]
    """int32 (S, M, E)."""
    mass: npt.NDArray[np.float64]
    """float64 (S, M, E)."""
    saliency: npt.NDArray[np.float64]
    """float64 (S, M, E)."""
    energy: npt.NDArray[np.float64]
    """float64 (S, M, E)."""
    entropy: npt.NDArray[np.float64]
    """float64 (S, M), nats."""
    peak: npt.NDArray[np.float32]
    """float32 (M, E)."""
    together: npt.NDArray[np.int32] | None
    """int32 (M, E, E); None of a measurement without pairs."""
    cosaliency: npt.NDArray[np.float32] | None
    """float32 (M, E, E); None of a measurement without pairs."""


class Session:
    """Sequences ``0 … n_seq-1`` that are computed in shared batches and may hold different keeps.

    Made by :meth:`moeshard.Model.session`. Not for use by two threads at once, except
    :meth:`abort` and :meth:`close`: the second is refused. After :meth:`close` every call raises MoeshardError.
    """

    def __init__(
        self,
        lease: Lease,
        parse: Callable[[KeepSpec | None], npt.NDArray[np.bool_] | None],
    ):
        self._lease = lease
        self._parse = parse

    @property
    def n_seq(self) -> int:
        return self._lease.context.n_seq_max

    @property
    def n_ctx(self) -> int:
        """Tokens that each sequence can hold."""
        return self._lease.context.n_ctx

    @property
    def n_graph_reuses(self) -> int:
        """How many micro-batches ran on the graph of the one before; changing keeps does not end the reuse."""
        return self._lease.context.n_graph_reuses

    def n_past(self, seq: int = 0) -> int:
        """Tokens that the sequence holds."""
        return self._lease.context.n_past(seq)

    def set_keep(self, keep: KeepSpec | None, seq: int | None = None) -> None:
        """Route the tokens of `seq` (None: of every sequence without a keep of its own) to kept experts only, from the
        next decode on; None clears. No graph is rebuilt.

        Raises MoeshardError where the keep does not fit the model, naming the layer.
        """
        mask = self._parse(keep)
        with self._lease.computing() as context:
            context.set_keep(mask, -1 if seq is None else seq)

    def decode(self, tokens: Mapping[int, TokensLike], outputs: str = "last") -> dict[int, npt.NDArray[np.float32]]:
        """Append tokens to sequences, all in one batch where they fit, and return logits per sequence.

        `outputs` is ``"last"``: (1, n_vocab) after the last token; ``"all"``: (n_tokens, n_vocab); ``"none"``:
        (0, n_vocab). A call that fails (a full sequence, an abort) leaves the sequences as they were; where the model's
        memory cannot be rolled back (recurrent layers), those that it had begun are empty afterwards (see `n_past`).
        """
        inputs = [(seq, as_tokens(ids)) for seq, ids in tokens.items()]
        with self._lease.computing() as context:
            return dict(zip(tokens, context.decode(inputs, outputs), strict=True))

    def set_meter(self, on: bool) -> None:
        """Measure, from the next decode on, what tokens under a keep miss; see `missed`."""
        with self._lease.computing() as context:
            context.set_meter(on)

    def missed(self, seq: int = 0) -> npt.NDArray[np.float32]:
        """Return float32 (n_tokens,): what each token of the last decode missed, mean over layers; see docs/serving.md.

        Of the weight that a layer's router would have given out, had nothing been dropped, the share of dropped
        experts. Empty for a sequence without a keep, but for a shard that was split with its whole routers. The last
        layer computes only tokens with output.
        """
        return self._lease.context.missed(seq)

    def missed_by_layer(self, seq: int = 0) -> npt.NDArray[np.float32]:
        """Return float32 (n_tokens, n MoE layers): the same in each layer, NaN where it did not compute the token."""
        return self._lease.context.missed_by_layer(seq)

    def trace(
        self, tokens: Mapping[int, TokensLike], sink: ChunkSink, *, probs: bool = False, norms: bool = False
    ) -> None:
        """Append tokens and hand the routing of each micro-batch to `sink`; memory stays flat."""
        inputs = [(seq, as_tokens(ids)) for seq, ids in tokens.items()]
        with self._lease.computing() as context:
            context.trace(inputs, chunk_sink(sink), probs, norms)

    def measure(
        self,
        tokens: Mapping[int, TokensLike],
        layers: Sequence[int],
        *,
        scores_are_logits: bool = False,
        pairs: bool = True,
    ) -> Statistics:
        """Append tokens and return sums over their routing: what `trace` would hand out, added up by the core.

        `scores_are_logits` says that the router's scores have yet to go through a softmax. `pairs` are the sums over
        pairs of experts, of E times as many numbers as all others together.
        """
        inputs = [(seq, as_tokens(ids)) for seq, ids in tokens.items()]
        with self._lease.computing() as context:
            return Statistics(*context.measure(inputs, list(layers), scores_are_logits, pairs))

    def reset(self, seq: int | None = None) -> None:
        """Empty a sequence, or all of them; keeps stay."""
        with self._lease.computing() as context:
            context.reset(-1 if seq is None else seq)

    def abort(self) -> None:
        """Make a computation that another thread is in raise MoeshardError."""
        self._lease.context.abort()

    def close(self) -> None:
        """Give the context back to the model."""
        self._lease.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def as_tokens(tokens: TokensLike) -> npt.NDArray[np.int32]:
    """Return token ids as int32 (n,); refuse what would be cut to fit."""
    from moeshard._core import MoeshardError

    array = np.asarray(tokens)
    if array.size == 0:
        return np.zeros(0, dtype=np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise MoeshardError(f"tokens must be a one-dimensional array of integers, got {array.dtype} {array.shape}")
    if int(array.min()) < 0 or int(array.max()) > np.iinfo(np.int32).max:
        raise MoeshardError("token ids must be between 0 and the size of the vocabulary")
    return array.astype(np.int32, copy=False)
