"""Objects may be collected in any order, and what they handed out stays valid."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moeshard import _core


def collected_traces(context: _core.Context, tokens: npt.NDArray[np.int32]) -> list[npt.NDArray[np.generic]]:
    arrays: list[npt.NDArray[np.generic]] = []

    def sink(seq: npt.NDArray[np.int32], pos: npt.NDArray[np.int32], layers: Sequence[tuple[object, ...]]) -> None:
        arrays.extend((seq, pos))
        arrays.extend(item for layer in layers for item in layer if isinstance(item, np.ndarray))

    context.trace([(0, tokens)], sink, probs=True, norms=True)
    return arrays


def test_arrays_outlive_context_and_model(tinymoe: Path) -> None:
    model = _core.Model(str(tinymoe))
    context = _core.Context(model, n_ctx=256, n_ubatch=32, n_threads=1)
    tokens = model.tokenize("The arrays own their memory, whoever made it.")
    logits = context.decode([(0, tokens)], "all")[0]
    context.reset()
    arrays = [tokens, logits, *collected_traces(context, tokens)]
    copies = [array.copy() for array in arrays]
    assert len(arrays) > 4
    del model, context
    gc.collect()
    # Something else takes the freed memory.
    other = _core.Context(_core.Model(str(tinymoe)), n_ctx=256, n_threads=1)
    other.decode([(0, copies[0][::-1])])
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_model_lives_as_long_as_its_context(tinymoe: Path) -> None:
    model = _core.Model(str(tinymoe))
    tokens = model.tokenize("A context needs its model.")
    context = _core.Context(model, n_ctx=64, n_threads=1)
    before = context.decode([(0, tokens)])[0]
    del model
    gc.collect()
    context.reset()
    np.testing.assert_array_equal(context.decode([(0, tokens)])[0], before)


def test_routing_lives_as_long_as_it_is_held(tinymoe: Path) -> None:
    model = _core.Model(str(tinymoe))
    routing = model.routing
    expected = routing.n_layer, routing.n_expert, routing.n_expert_used
    del model
    gc.collect()
    assert (routing.n_layer, routing.n_expert, routing.n_expert_used) == expected


def test_generation_keeps_context_and_model(tinymoe: Path) -> None:
    def pieces() -> _core.Generation:
        model = _core.Model(str(tinymoe))
        context = _core.Context(model, n_ctx=128, n_threads=1)
        return _core.Generation(
            context, model.tokenize("Once upon a time"), max_tokens=8, sampling=_core.SamplingParams(temperature=0)
        )

    generation = pieces()
    first = next(generation)
    gc.collect()
    assert first + b"".join(generation) == b"".join(pieces())
    prompt, tokens = generation.prompt_tokens, generation.tokens
    del generation
    gc.collect()
    assert len(prompt) > 0
    assert len(tokens) == 8


def test_gguf_views_outlive_the_map(tinymoe: Path) -> None:
    gguf = _core.GGUFMap(str(tinymoe))
    metadata, tensors, infos, parts = gguf.metadata, gguf.tensors, gguf.tensor_infos, gguf.parts
    name = max(infos, key=lambda info: info.nbytes).name
    view = tensors[name]
    expected = view.copy()
    layout = gguf.moe_layout()
    del gguf
    gc.collect()
    assert metadata["general.architecture"] == layout.arch
    assert parts[0].path == str(tinymoe)
    assert infos[0].nbytes > 0
    del tensors, infos, metadata, parts
    gc.collect()
    np.testing.assert_array_equal(view, expected)
    assert not view.flags.writeable


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order(tinymoe: Path, order: tuple[int, ...]) -> None:
    model = _core.Model(str(tinymoe))
    context = _core.Context(model, n_ctx=64, n_threads=1)
    context.set_keep(np.ones((model.routing.n_layer, model.routing.n_expert), np.bool_))
    generation = _core.Generation(context, model.tokenize("In any order"), max_tokens=4)
    next(generation)
    gguf_view = _core.GGUFMap(str(tinymoe)).tensor_infos
    held: list[object] = [model, context, generation, gguf_view]
    del model, context, generation, gguf_view
    for index in order:
        held[index] = None
        gc.collect()
