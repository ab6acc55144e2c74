"""Text generation as an iterator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import moeshard._core as _core
    from moeshard.runtime.contexts import Lease


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
