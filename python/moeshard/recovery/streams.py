"""The whole model and a shard reading the same text: what the shard's stream lacks, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeshard._core import GGUFMap, MoeshardError
from moeshard.arrays import Floats, Ids, Tokens

if TYPE_CHECKING:
    from moeshard.runtime.model import Model
    from moeshard.runtime.states import LayerStates, StateReader

TOKENS_AT_ONCE = 2048
KEPT_BYTES = 1 << 30
"""The whole model's streams are kept where they take no more, in half precision; else read again for every block."""
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


@dataclass(frozen=True, eq=False)
class _Kept:
    """Residual streams of one layer in half precision, each token's in a unit of its own."""

    values: npt.NDArray[np.float16]
    unit: Floats

    @staticmethod
    def of(residual: Floats) -> _Kept:
        unit = np.maximum(np.abs(residual).max(axis=1, keepdims=True), _TINY)
        return _Kept((residual / unit).astype(np.float16), unit)

    def get(self) -> Floats:
        return self.values.astype(np.float32) * self.unit


def residual_scale(model: GGUFMap) -> np.float32:
    """Return what a model multiplies the outputs of its experts by before they join the stream (Granite, MiniCPM)."""
    arch = str(model.metadata.get("general.architecture"))
    value = model.metadata.get(f"{arch}.residual_scale")
    return np.float32(value if arch.startswith(("granite", "minicpm")) and isinstance(value, float) and value else 1)


class Text:
    """Sequences to read, and what the whole model's streams were, where that is kept."""

    def __init__(self, sequences: Sequence[Tokens]):
        self.sequences = sequences
        self.kept: list[dict[int, _Kept]] = []

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.sequences))


class Streams:
    """Reads text with the whole model and with a shard of it, some sequences at a time."""

    def __init__(self, whole: Model, n_tokens: int, layers: Sequence[int]):
        """`n_tokens`: of the longest sequence; `layers`: all that will be read."""
        self._factor = residual_scale(GGUFMap(whole.path))
        self._whole = whole
        self._n_tokens = n_tokens
        self._layers = list(layers)
        self._n_seq = max(1, min(64, TOKENS_AT_ONCE // n_tokens))
        self._teacher: StateReader = whole.state_reader(self._n_seq, n_tokens)
        self._keeps = False

    def _wanted(self, text: Text, at: int, layers: Sequence[int]) -> dict[int, Floats]:
        """Return the whole model's residual streams of a batch of sequences, by layer."""
        batch = text.sequences[at : at + self._n_seq]
        number = at // self._n_seq
        if number < len(text.kept):
            return {layer: text.kept[number][layer].get() for layer in layers}
        # Before anything is read, a first sequence says how much all would take.
        if number == 0:
            n_embd = self._teacher.read(batch[:1], layers[:1])[0].residual.shape[1]
            self._keeps = 2 * text.n_tokens * n_embd * len(self._layers) <= KEPT_BYTES
        read = {
            state.layer: state.residual for state in self._teacher.read(batch, self._layers if self._keeps else layers)
        }
        if self._keeps:
            text.kept.append({layer: _Kept.of(residual) for layer, residual in read.items()})
            return self._wanted(text, at, layers)
        return read

    def read(
        self, shard: Model, text: Text, layers: Sequence[int], scales: dict[int, Floats]
    ) -> Iterator[tuple[int, list[Lack]]]:
        """Yield, batch by batch, how many sequences it has, and what the shard's stream lacks after each of `layers`.

        Tokens are divided by the norm of the whole model's stream: what follows a layer looks at the
        stream's direction, and the first tokens of a text may be a thousand times as long as others.

        Args:
            shard: with the same tokenizer.
            text: to be read.
            layers: ascending.
            scales: by layer, what the file multiplies each expert's output by, float32 (E,).
        """
        student = shard.state_reader(self._n_seq, self._n_tokens)
        for at in range(0, len(text), self._n_seq):
            batch = text.sequences[at : at + self._n_seq]
            wanted = self._wanted(text, at, layers)
            lacks: list[Lack] = []
            earlier: Floats | None = None
            for own in student.read(batch, layers):
                target = wanted[own.layer] - own.residual
                lacks.append(self._lack(own, wanted[own.layer], target, earlier, shard, scales[own.layer]))
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
        factor = scale[own.ids] if own.scaled else np.ones_like(own.weights)
        if not shard.routing.weighs_inputs:
            factor = factor * own.weights
        unit = (1 / np.sqrt(np.maximum(np.square(right).mean(axis=1), _TINY)))[:, None]
        features = own.hidden * (self._factor * factor * unit)[:, :, None]
        return Lack(own.layer, own.ids, features, target * unit, None if earlier is None else earlier * unit)
