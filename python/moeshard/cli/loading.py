"""Loading the model that a command works with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeshard.runtime.model import Model


def load_model(
    name: str,
    *,
    n_ctx: int | None = None,
    n_threads: int = 0,
    n_gpu_layers: int = -1,
    workers: dict[str, Any] | None = None,
) -> Model:
    """Load a MODEL argument, with a progress bar where it takes long; see `moeshard.Model` for the rest.

    `workers` is what `moeshard.cli.options.pipeline` returns.
    """
    from moeshard.cli.output import progress
    from moeshard.runtime.limits import MAX_INT32
    from moeshard.runtime.model import Model
    from moeshard.traffic.embedded import resolve_model

    with progress() as update:

        def loaded(fraction: float) -> None:
            update(f"loading {name}", fraction)

        return Model(
            resolve_model(name),
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_gpu_layers=min(n_gpu_layers, MAX_INT32),  # a model has fewer anyway
            progress=loaded,
            **(workers or {}),
        )
