"""The whole model and a shard reading the same text: what the shard's stream lacks, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeshard._core import MoeshardError
from moeshard.arrays import Floats, Ids, Tokens

if TYPE_CHECKING:
    from moeshard.runtime.model import Model
    from moeshard.runtime.states import LayerStates, StateReader

TOKENS_AT_ONCE = 2048
_TINY = np.float32(1e-12)


@dataclass(frozen=True)
class Lack:
    """A layer of a shard, for n tokens: what its experts were asked, and what the stream lacks after it."""

    layer: int
    ids: Ids
    features: Floats
    """float32 (n, top_k, n_ff): weighted activations, as the layer's down projections are applied to them."""
    target: Floats
    """float32 (n, n_embd): the whole model's residual stream less the shard's."""
    earlier: Floats | None
    """The same after the layer before it in what was read; None for the first."""


class Streams:
    """Reads text with the whole model and with a shard of it, some sequences at a time."""

    def __init__(self, whole: Model, n_tokens: int):
        """`n_tokens`: of the longest sequence."""
        self._whole = whole
        self._n_tokens = n_tokens
        self._n_seq = max(1, min(64, TOKENS_AT_ONCE // n_tokens))
        self._teacher: StateReader = whole.state_reader(self._n_seq, n_tokens)

    def read(
        self, shard: Model, sequences: Sequence[Tokens], layers: Sequence[int], scales: dict[int, Floats]
    ) -> Iterator[tuple[int, list[Lack]]]:
        """Yield, batch by batch, how many sequences it has, and what the shard's stream lacks after each of `layers`.

        Tokens are divided by the norm of the whole model's stream: what follows a layer looks at the
        stream's direction, and the first tokens of a text may be a thousand times as long as others.

        Args:
            shard: with the same tokenizer.
            sequences: token ids each.
            layers: ascending.
            scales: by layer, what the file multiplies each expert's output by, float32 (E,).
        """
        student = shard.state_reader(self._n_seq, self._n_tokens)
        for at in range(0, len(sequences), self._n_seq):
            batch = sequences[at : at + self._n_seq]
            wanted = self._teacher.read(batch, layers)
            found = student.read(batch, layers)
            lacks: list[Lack] = []
            earlier: Floats | None = None
            for own, right in zip(found, wanted, strict=True):
                target = right.residual - own.residual
                lacks.append(self._lack(own, right.residual, target, earlier, shard, scales[own.layer]))
                earlier = target
            yield len(batch), lacks

    def _lack(
        self, own: LayerStates, right: Floats, target: Floats, earlier: Floats | None, shard: Model, scale: Floats
    ) -> Lack:
        if not np.isfinite(target).all():
            raise MoeshardError(
                f"{self._whole.path}: layer {own.layer}: the residual stream is not finite (NaN or infinity), so "
                f"nothing can be fitted to it; get or convert the model again"
            )
        factor = scale[own.ids]
        if not shard.routing.weighs_inputs:
            factor = factor * own.weights
        unit = (1 / np.sqrt(np.maximum(np.square(right).mean(axis=1), _TINY)))[:, None]
        features = own.hidden * (factor * unit)[:, :, None]
        return Lack(own.layer, own.ids, features, target * unit, None if earlier is None else earlier * unit)
