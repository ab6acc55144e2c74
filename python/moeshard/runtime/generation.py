"""Text generation as an iterator."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.runtime.limits import MAX_INT32, MAX_SEED

if TYPE_CHECKING:
    import moeshard._core as _core
    from moeshard.runtime.contexts import Lease


def generation_options(*, stop: str | Sequence[str], seed: int | None, **numbers: float) -> dict[str, Any]:
    """Return the options of `Model.generate` as the engine takes them.

    Raises:
        MoeshardError: one is no number that the engine could take; it is named. Others are refused by the engine.
    """
    options: dict[str, Any] = {"stop": [stop] if isinstance(stop, str) else list(stop)}
    if not all(isinstance(text, str) for text in options["stop"]):
        raise MoeshardError(f"stop must be a text or several, got {stop!r}")
    options["seed"] = None if seed is None else _integer("seed", seed, 0, MAX_SEED, "; None for a random one")
    for name in ("max_tokens", "top_k", "repeat_last_n"):
        options[name] = _integer(name, numbers.pop(name), -MAX_INT32, MAX_INT32)
    for name, value in numbers.items():
        if not (isinstance(value, (int, float, np.number)) and math.isfinite(value) and value >= 0):
            raise MoeshardError(f"{name} must be a finite number that is not negative, got {value!r}")
        options[name] = float(value)
    return options


def _integer(name: str, value: object, least: int, most: int, otherwise: str = "") -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = most + 1
    if not least <= number <= most:
        raise MoeshardError(f"{name} must be a whole number from {least} to {most}{otherwise}, got {value!r}")
    return number


class Generation(Iterator[str]):
    """One answer, piece by piece. Ends by itself, by :meth:`close`, or when it is dropped.

    Not for use by two threads at once: the second is refused.
    """

    def __init__(self, native: _core.Generation, lease: Lease):
        self._native = native
        self._lease: Lease | None = lease
        self._pieces: list[str] = []

    def __next__(self) -> str:
        if self._lease is None:
            raise StopIteration
        try:
            with self._lease.computing():
                piece = next(self._native).decode("utf-8", errors="replace")
        except BaseException:
            self.close()
            raise
        self._pieces.append(piece)
        return piece

    def close(self) -> None:
        """Give the context back; what was generated stays readable."""
        if self._lease is not None:
            lease, self._lease = self._lease, None
            lease.close()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def text(self) -> str:
        """What was generated so far."""
        return "".join(self._pieces)

    @property
    def prompt_tokens(self) -> npt.NDArray[np.int32]:
        """int32 (n,): the tokens of the prompt."""
        return self._native.prompt_tokens

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """int32 (n,): the tokens generated so far."""
        return self._native.tokens

    @property
    def stop_reason(self) -> str:
        """``running``; or ``end`` (the model ended), ``stop`` (a stop text), ``length`` (max_tokens), ``context``
        (the context is full)."""
        return self._native.stop_reason

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of computing the prompt; 0 before it was."""
        seconds = self._native.prompt_seconds
        return len(self.prompt_tokens) / seconds if seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of generating, without the prompt and the first token, which comes with it; 0 before the second."""
        seconds = self._native.generation_seconds
        return (len(self.tokens) - 1) / seconds if seconds else 0.0
