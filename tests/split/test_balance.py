"""The nearest balanced keep, against all others where there are few."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli
from hypothesis import given, settings
from hypothesis import strategies as st

import moeshard
from moeshard import MoeshardError, balanced_keep


def is_balanced(keep: np.ndarray, groups: int, fewest: int) -> bool:
    counts = keep.reshape(len(keep) * groups, -1).sum(axis=1)
    return bool((counts == counts[0]).all() and counts[0] >= fewest)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**8 - 1), st.sampled_from([1, 2]))
def test_nothing_is_nearer(bits: int, groups: int) -> None:
    keep = np.array([(bits >> i) & 1 for i in range(8)], dtype=bool).reshape(2, 4)
    fewest = 2 if groups == 2 else 1
    found = balanced_keep(keep, range(2), expert_groups=groups)
    assert is_balanced(found, groups, fewest)
    others = (np.array(cells, dtype=bool).reshape(2, 4) for cells in product((False, True), repeat=8))
    nearest = min(int((keep ^ other).sum()) for other in others if is_balanced(other, groups, fewest))
    assert int((keep ^ found).sum()) == nearest


def test_rows_without_experts_stay(tmp_path: Path) -> None:
    keep = np.zeros((3, 8), dtype=bool)
    keep[1, :5] = True
    keep[2, 2:] = True
    found = balanced_keep(keep, [1, 2])
    assert not found[0].any()
    assert found[1].sum() == found[2].sum()
    assert balanced_keep(keep, [1, 2], n_used=7)[1].sum() == 7
    for wrong in (keep.astype(int), keep[0]):
        with pytest.raises(MoeshardError):
            balanced_keep(wrong, [0])
    with pytest.raises(MoeshardError, match="3 groups"):
        balanced_keep(keep, [1, 2], expert_groups=3)


def test_the_command_line_offers_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("0: 0-63\n1: 0-62\n2: 0-63,100\n3: 64-127\n4: 64-127\n")
    done = cli("split", "tinymoe", "-o", tmp_path / "x.gguf", "--keep", tmp_path / "keep.txt")
    assert done.code == 1 and "--balance" in done.err and "layer 1 keeps 63" in done.err
    done = cli("split", "tinymoe", "-o", tmp_path / "x.gguf", "--keep", tmp_path / "keep.txt", "--balance")
    assert done.code == 0 and "1 experts dropped, 1 added" in done.err
    assert moeshard.Model(tmp_path / "x.gguf", n_threads=1).n_expert == 64
