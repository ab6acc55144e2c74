"""The keep nearest to another one that a GGUF file can hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.keep.text import Keep


def balanced_keep(keep: npt.ArrayLike, moe_layers: Sequence[int], *, expert_groups: int = 1, n_used: int = 1) -> Keep:
    """Return the nearest keep that holds equally many experts in every layer and every group of experts.

    A GGUF file has one count of experts for all layers, and a model with grouped routing (DeepSeek-V3) divides it into
    groups of equal size.

    Args:
        keep: bool (n_layer, n_expert).
        moe_layers: the layers that count; other rows stay as they are.
        expert_groups: into how many groups of consecutive experts the model divides a layer; 0 or 1: none.
        n_used: experts per token. At least so many are held.

    Returns:
        A new bool (n_layer, n_expert). No other has fewer differences from `keep`; where several have as few, the
        highest ids are dropped and the lowest added.

    Raises:
        MoeshardError: `keep` is no such array, or the groups do not divide the experts.
    """
    array = np.asarray(keep)
    if array.ndim != 2 or array.dtype != np.bool_ or not len(moe_layers):
        raise MoeshardError(f"keep must be a bool array (n_layer, n_expert), got {array.dtype} {array.shape}")
    n_groups = max(1, expert_groups)
    n_expert = array.shape[1]
    if n_expert % n_groups:
        raise MoeshardError(f"{n_expert} experts cannot be divided into {n_groups} groups of equal size")
    balanced = array.copy()
    rows = balanced[list(moe_layers)].reshape(-1, n_expert // n_groups)
    counts = rows.sum(axis=1)
    # A group is scored by its two best experts, so one alone never wins.
    fewest = max(-(-n_used // n_groups), 2 if n_groups > 1 else 1)
    # The median has the least sum of distances.
    count = int(np.clip(np.sort(counts)[len(counts) // 2], fewest, n_expert // n_groups))
    for row, held in zip(rows, counts, strict=True):
        if held > count:
            row[np.flatnonzero(row)[count:]] = False
        elif held < count:
            row[np.flatnonzero(~row)[: count - held]] = True
    balanced[list(moe_layers)] = rows.reshape(len(moe_layers), n_expert)
    return balanced
