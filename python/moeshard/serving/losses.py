"""Measured losses on their way from one server to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeshard._core import MoeshardError
from moeshard.serving.placer import Losses


def losses_to_json(losses: Losses) -> dict[str, Any]:
    """Return a JSON object; numbers survive it to the last bit."""
    return {
        "nodes": losses.nodes.tolist(),
        "full": None if losses.full is None else losses.full.tolist(),
        "n_tokens": losses.n_tokens,
        "n_cut": losses.n_cut,
    }


def losses_from_json(told: Mapping[str, Any], n_nodes: int) -> Losses:
    """Read what `losses_to_json` wrote.

    Args:
        told: the object.
        n_nodes: how many nodes the other server has.

    Raises:
        MoeshardError: it is something else.
    """
    try:
        full = np.array(told["full"], dtype=np.float64)
        nodes = np.array(told["nodes"], dtype=np.float64).reshape(n_nodes, full.size)
        found = Losses(nodes, full, n_tokens=int(told["n_tokens"]), n_cut=int(told["n_cut"]))
    except (KeyError, TypeError, ValueError) as error:
        raise MoeshardError(f"the losses of a prompt cannot be read: {error}") from error
    if full.ndim != 1 or not (np.isfinite(full).all() and np.isfinite(nodes).all()):
        raise MoeshardError("the losses of a prompt are no numbers")
    return found
