"""Which of a model's layers each of several workers holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moeshard._core import GGUFMap, MoeshardError
from moeshard.runtime.origin import Origin
from moeshard.sizes import size

_LAYER = re.compile(r"blk\.(\d+)\.")


def layer_bytes(origin: Origin) -> list[int]:
    """Return the bytes of each layer's tensors, and as a last entry those of the output, which counts as a layer.

    The token embeddings stay on the machine that asks.
    """
    infos = (origin.segments or GGUFMap(origin.path)).tensor_infos
    found = [0] * (origin.layout().n_layer + 1)
    has_output = any(info.name == "output.weight" for info in infos)
    for info in infos:
        layer = _LAYER.match(info.name)
        if layer is not None:
            found[int(layer[1])] += info.nbytes
        elif info.name.startswith("output") or (info.name == "token_embd.weight" and not has_output):
            found[-1] += info.nbytes
    return found


def check_split(split: Sequence[int], n_layer: int, n_workers: int) -> list[int]:
    """Return a split that somebody asked for.

    Raises:
        MoeshardError: it has not a number for each worker, or does not add up to the layers of the model.
    """
    if len(split) != n_workers or any(part < 1 for part in split) or sum(split) != n_layer:
        raise MoeshardError(
            f"the split {','.join(map(str, split))} does not fit: give a number of layers, at least 1, for each of the "
            f"{n_workers} workers, {n_layer} together; or leave it out"
        )
    return list(split)


def split_layers(n_bytes: Sequence[int], memory: Sequence[int], workers: Sequence[str]) -> list[int]:
    """Divide layers among workers so that the fullest is as little full as can be.

    Args:
        n_bytes: see `layer_bytes`; the last entry goes with the last worker.
        memory: bytes that each worker has, in the order of the layers that they take.
        workers: their names, for messages.

    Returns:
        How many layers each takes, at least one.

    Raises:
        MoeshardError: there are fewer layers than workers, or they do not fit.
    """
    n_layer, n = len(n_bytes) - 1, len(memory)
    if n_layer < n:
        raise MoeshardError(f"a model of {n_layer} layers cannot be divided among {n} workers; name fewer")
    sums = [0]
    for layer in n_bytes:
        sums.append(sums[-1] + layer)

    def fullness(worker: int, begin: int, end: int) -> float:
        return (sums[end + 1 if worker == n - 1 else end] - sums[begin]) / max(memory[worker], 1)

    # best[end]: the least possible fullness when the workers so far hold the first `end` layers, and where each began.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for worker in range(n):
        reached: dict[int, tuple[float, list[int]]] = {}
        for begin, (fullest, begins) in best.items():
            for end in range(begin + 1, n_layer - (n - 1 - worker) + 1):
                found = max(fullest, fullness(worker, begin, end))
                if end not in reached or found < reached[end][0]:
                    reached[end] = (found, [*begins, begin])
        best = reached
    fullest, begins = best[n_layer]
    if fullest > 1:
        raise MoeshardError(
            f"the layers take {size(sums[-1])}, and the workers have "
            + ", ".join(f"{size(m)} ({w})" for w, m in zip(workers, memory, strict=True))
            + "; add a worker, or load fewer experts (keep)"
        )
    return [end - begin for begin, end in zip(begins, [*begins[1:], n_layer], strict=True)]
