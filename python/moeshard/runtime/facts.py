"""What a loaded model is: its architecture, layers, experts, bytes."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

import moeshard._core as _core
from moeshard.runtime.origin import Origin


class ModelFacts:
    """The part of `Model` that says what it is. After `Model.close` most of it raises MoeshardError."""

    _origin: Origin

    @property
    def _native(self) -> _core.Model:
        raise NotImplementedError

    @property
    def path(self) -> str:
        return self._origin.path

    @property
    def routing(self) -> _core.Routing:
        """Layers, experts, experts per token and expert groups, as the engine uses them."""
        return self._native.routing

    @cached_property
    def layout(self) -> _core.MoeLayout:
        """What of the loaded weights depends on experts, and their bytes."""
        return self._origin.layout()

    @cached_property
    def expert_ids(self) -> npt.NDArray[np.int32]:
        """Int32 (n_layer, n_expert): which expert of the whole model each expert of this one is.

        The numbers themselves for a whole model, those kept, ascending, for a shard; -1 in layers without experts, and
        behind the last where a layer of a shard holds fewer than others.
        """
        ids = np.full((self.n_layer, self.n_expert), -1, dtype=np.int32)
        held = self._origin.held
        for layer in self.moe_layers:
            own = np.arange(self.n_expert) if held is None else np.flatnonzero(held[layer])
            ids[layer, : own.size] = own
        return ids

    @property
    def arch(self) -> str:
        """The architecture's name in llama.cpp, e.g. ``qwen3moe``."""
        return self.layout.arch

    @property
    def description(self) -> str:
        """Architecture, size and file type in one line."""
        return self._native.description

    @property
    def n_layer(self) -> int:
        """Blocks of the model: the rows of a keep."""
        return self.routing.n_layer

    @property
    def n_expert(self) -> int:
        """Experts per MoE layer: the columns of a keep. 0 for a dense model.

        In a shard whose layers hold different numbers (``routing.expert_counts``) it is the largest of them, and what a
        keep says of experts that a layer does not have carries no meaning.
        """
        return self.routing.n_expert

    @property
    def is_whole(self) -> bool:
        """Whether no expert of the model was left out."""
        held = self._origin.held
        return held is None or bool(held[self.moe_layers].all())

    @property
    def n_expert_used(self) -> int:
        """Experts that each token uses (of the widest layer where layers differ: see ``routing``)."""
        return max(self.routing.n_expert_used, default=0)

    @property
    def moe_layers(self) -> list[int]:
        """The layers that route, ascending."""
        return self.routing.moe_layers

    @property
    def n_vocab(self) -> int:
        return self._native.n_vocab

    @property
    def n_ctx_train(self) -> int:
        """TokensLike of context that the model was trained on."""
        return self._native.n_ctx_train

    @property
    def trunk_bytes(self) -> int:
        """Bytes of all tensors that are not routed experts."""
        return self.layout.trunk_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return self.layout.expert_bytes
