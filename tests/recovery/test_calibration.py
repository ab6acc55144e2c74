"""How text is divided into what is fitted to and what is judged by."""

from __future__ import annotations

import numpy as np
import pytest

from moeshard import MoeshardError
from moeshard.recovery.calibration import EACH, Calibration
from moeshard.recovery.node import blocks_of


def calibration(*sizes: int) -> Calibration:
    """Windows of one token each, its number; so many of each domain."""
    domain = np.repeat(np.arange(len(sizes)), sizes)
    return Calibration([np.array([number], dtype=np.int32) for number in range(len(domain))], domain)


def test_every_window_is_used_once_and_every_kind_is_held_out() -> None:
    text = calibration(40, 16, 24)
    parts = text.divide(np.arange(80))
    tokens = [int(window[0]) for part in parts for side in part for window in side]
    assert sorted(tokens) == list(range(80))
    judged = [{int(text.domain[window[0]]) for window in judge} for _, judge in parts]
    assert judged == [{0, 1}, {2}]  # the largest, then in turn
    for fit, judge in parts:
        kinds = {int(text.domain[window[0]]) for window in fit}
        assert kinds == {int(text.domain[window[0]]) for window in judge}
    assert sum(len(judge) for _, judge in parts) == 80 // EACH


def test_one_kind_of_text_has_no_other() -> None:
    (fit, judge), (no_fit, no_judge) = calibration(20, 4).divide(np.arange(20))
    assert (len(fit), len(judge), no_fit, no_judge) == (18, 2, [], [])


def test_too_little_text() -> None:
    with pytest.raises(MoeshardError, match="7 windows, at least 8 are needed"):
        calibration(30).divide(np.arange(7))
    with pytest.raises(MoeshardError, match="at least 8 are needed, and 5 of some kind"):
        calibration(4, 4, 4).divide(np.arange(12))


def test_blocks() -> None:
    assert blocks_of([1, 2, 4, 5, 7], None) == [[1], [2], [4], [5], [7]]
    assert blocks_of([1, 2, 4, 5, 7], 2) == [[1, 2, 4], [5, 7]]
    assert blocks_of([1, 2], 9) == [[1], [2]]
