"""When a session is looked at again: the running sum, what it is learned from, and where the text decides it goes."""

from __future__ import annotations

import numpy as np
import pytest

from moeshard import MoeshardError
from moeshard.evaluation.alarms import Alarms, alarms_from_json, alarms_to_json, learn_alarms
from moeshard.evaluation.losses import Losses
from moeshard.placement.meter import FEWEST_TOKENS, MOST_TOKENS, Limits, Meter, evidence, n_deciding, place_again

NAMES = ["a", "b"]


def test_the_sum_is_pages() -> None:
    rng = np.random.default_rng(1)
    missed = rng.random(300)
    meter, total, since = Meter(Limits(0.5, 2.0)), 0.0, 0
    sums = evidence(missed, 0.5)
    for at, share in enumerate(missed):
        total = max(0.0, total + share - 0.5)
        since = since + 1 if total > 0 else 0
        meter.add([share])
        assert meter.passed == (total > 2.0) and meter.n_since == since and meter.n == at + 1
        assert sums[at] == pytest.approx(total, abs=1e-9)
    assert sums.max() > 2 and meter.mean == pytest.approx(missed.mean())


def test_who_stays_is_asked_for_twice_as_much() -> None:
    meter = Meter(Limits(0.5, 1.0))
    meter.add([1.0, 1.0])
    assert not meter.passed
    meter.add([1.0])
    assert meter.passed and meter.n_since == 3
    meter.stayed()
    meter.add([1.0] * 4)
    assert not meter.passed
    meter.add([1.0])
    assert meter.passed and meter.n_since == 5 and meter.mean == 1


def test_without_limits_nothing_passes() -> None:
    meter = Meter(None)
    assert meter.mean is None
    meter.add([1.0] * 1000)
    assert not meter.passed and meter.mean == 1 and meter.n_since == 0


def test_what_came_since_the_change_decides() -> None:
    assert [n_deciding(n) for n in (0, FEWEST_TOKENS, 50, 10_000)] == [FEWEST_TOKENS, FEWEST_TOKENS, 50, MOST_TOKENS]
    full = np.full(20, 1.0)
    jitter = np.linspace(-0.1, 0.1, 20)
    here, there = 1.1 + jitter, 2.0 - jitter
    assert place_again(NAMES, np.array([here, there]), full, "a") is None
    moved = place_again(NAMES, np.array([there, here]), full, "a")
    assert moved is not None and moved.node == "b"
    # Too close to call: it stays.
    noisy = np.where(np.arange(20) % 2, 0.0, 3.0)
    assert place_again(NAMES, np.array([here + 0.1, 3.0 - noisy]), full, "a") is None
    # No node is good enough: the whole model.
    nobody = place_again(NAMES, np.array([there + 1, there + 2]), full, "a")
    assert nobody is not None and nobody.node is None
    assert place_again(NAMES, np.array([there + 1, there + 2]), full, "a", min_quality=0) is None


def losses(missed: bool = True, n_windows: int = 8) -> Losses:
    """Two domains, each at home on one of two nodes, where it misses 0.3, elsewhere 0.8, at a loss of 2 more."""
    rng = np.random.default_rng(2)
    domain = np.repeat([0, 1], n_windows)
    away = domain[None] != np.array([0, 1])[:, None]
    shape = (2, domain.size, 96)
    full = rng.gamma(2.0, size=shape[1:])
    groups = full + np.where(away, 2.2, 0.2)[:, :, None] + rng.normal(0, 0.3, shape)
    shares = np.where(away, 0.8, 0.3)[:, :, None] + rng.uniform(-0.1, 0.1, shape)
    zeros = np.zeros(shape, dtype=np.float32)
    return Losses(
        NAMES, domain, 32, full.astype(np.float32), groups.astype(np.float32), zeros, zeros > 0, np.zeros(shape[:2]),
        shares.astype(np.float32) if missed else None,
    )  # fmt: skip


def test_limits_lie_between_what_is_normal_and_what_breaks_the_promise() -> None:
    found = learn_alarms(losses(), NAMES)
    assert found is not None and list(found.limits()) == NAMES
    for node in found.nodes:
        assert node.normal == pytest.approx(0.3, abs=0.01) and node.broken == pytest.approx(0.8, abs=0.01)
        assert node.limits is not None and node.normal < node.limits.reference < node.broken
    assert found.relation.slope == pytest.approx(4, abs=0.1) and found.relation.correlation > 0.95
    assert found.relation.intercept == pytest.approx(-1, abs=0.1) and found.relation.n == 2 * 16 * 3
    assert found.looked_at <= 0.4
    # A session that leaves is looked at within a few tokens.
    meter = Meter(found.limits()["a"])
    meter.add([0.3] * 200)
    assert not meter.passed
    meter.add([0.8] * 3)
    assert meter.passed


def test_nothing_is_learned_where_there_is_too_little() -> None:
    assert learn_alarms(losses(missed=False), NAMES) is None
    few = learn_alarms(losses(n_windows=2), NAMES)
    assert few is not None and few.limits() == {}
    assert all(node.normal is None and node.broken is None for node in few.nodes)
    # A promise that nobody breaks has no limit.
    generous = learn_alarms(losses(), NAMES, quality=1e-3)
    assert generous is not None and generous.limits() == {} and generous.nodes[0].normal is not None


@pytest.mark.parametrize("n_windows", [2, 8])
def test_as_json_and_back(n_windows: int) -> None:
    found = learn_alarms(losses(n_windows=n_windows), NAMES)
    assert isinstance(found, Alarms)
    told = alarms_to_json(found)
    assert alarms_from_json(told, "meter") == found
    told["nodes"][1]["limits"] = {"reference": 0.5}
    with pytest.raises(MoeshardError, match=r"meter.nodes\[1\].limits.threshold: is missing"):
        alarms_from_json(told, "meter")
