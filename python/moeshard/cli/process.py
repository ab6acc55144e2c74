"""What a process of the command line does about signals and warnings."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_TWICE_SECONDS = 1.0
"""The same request may come twice: ``timeout`` sends it to the process and to its group."""


@contextmanager
def orderly_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does: what was begun is removed.

    The exit code is 128 and the signal's number. A signal that is ignored (``nohup``) stays so.
    """
    last = -math.inf

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _TWICE_SECONDS:
            raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there Python handles signals
        yield
        return
    earlier = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in earlier.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Show warnings of moeshard as commands show theirs, without the place in its code."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if category.__module__.partition(".")[0] == "moeshard":
                from moeshard.cli.terminal import warn

                warn(str(message))
            else:
                show(message, category, *place, **more)

        warnings.showwarning = tell
        yield
