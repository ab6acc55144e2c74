"""The arithmetic of recoveries beside that of a textbook: one dense matrix, and numpy's least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeshard.recovery.moments import Moments, Sample, apply, gains
from moeshard.recovery.solve import ridge_solution

N_EXPERT, N_FF, N_EMBD, TOP_K, N = 6, 4, 5, 3, 300
Array = np.ndarray[Any, Any]


def tokens(seed: int) -> tuple[Array, Array, Array]:
    """Ids of distinct experts, their features, and targets."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(N_EXPERT, TOP_K, replace=False) for _ in range(N)]).astype(np.int32)
    features = rng.standard_normal((N, TOP_K, N_FF)).astype(np.float32)
    return ids, features, rng.standard_normal((N, N_EMBD)).astype(np.float32)


def dense(ids: Array, features: Array) -> Array:
    """A row of all experts' features for each token, zeros where it did not choose one."""
    rows = np.zeros((len(ids), N_EXPERT * N_FF))
    for token, chosen in enumerate(ids):
        for slot, expert in enumerate(chosen):
            rows[token, expert * N_FF : (expert + 1) * N_FF] = features[token, slot]
    return rows


def moments_of(ids: Array, features: Array, target: Array, earlier: Array | None = None) -> Moments:
    found = Moments(N_EXPERT, N_FF, N_EMBD)
    for at in range(0, N, 70):  # pieces of unlike size: sums must not know
        rows = slice(at, at + 70)
        found.add(ids[rows], features[rows], target[rows], None if earlier is None else earlier[rows])
    return found


def test_sums_are_those_of_the_dense_matrix() -> None:
    ids, features, target = tokens(1)
    phi = dense(ids, features)
    found = moments_of(ids, features, target)
    found.close()
    np.testing.assert_allclose(found.gram, phi.T @ phi, atol=1e-3)
    np.testing.assert_allclose(found.cross, phi.T @ target, atol=1e-3)
    np.testing.assert_array_equal(found.chosen, np.bincount(ids.ravel(), minlength=N_EXPERT))
    np.testing.assert_allclose(found.scale, np.square(phi).sum() / phi.shape[1], rtol=1e-5)


def test_what_an_earlier_layer_will_give_back_is_no_target() -> None:
    ids, features, target = tokens(2)
    earlier = tokens(3)[2]
    found = moments_of(ids, features, target, earlier)
    found.close(0.25)
    np.testing.assert_allclose(found.cross, dense(ids, features).T @ (target - 0.25 * earlier), atol=1e-3)
    sample = Sample(N)
    sample.add(ids, features, target, earlier)
    sample.close(0.25)
    np.testing.assert_allclose(sample.error(), np.square(target - 0.25 * earlier).sum() / N, rtol=1e-5)


@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_the_solution_is_that_of_ridge_regression(ridge: float) -> None:
    ids, features, target = tokens(4)
    phi = dense(ids, features)
    moments = moments_of(ids, features, target)
    moments.close()
    # The textbook's way: more rows, which hold each weight at 0.
    held = np.sqrt(ridge * moments.scale) * np.eye(phi.shape[1])
    expected = np.linalg.lstsq(np.vstack([phi, held]), np.vstack([target, 0 * held[:, :N_EMBD]]), rcond=None)[0]
    np.testing.assert_allclose(ridge_solution(moments, ridge), expected, atol=1e-5)


def test_blocks_come_to_the_same_solution() -> None:
    moments = moments_of(*tokens(5))
    moments.close()
    at_once = ridge_solution(moments, 0.03)
    in_blocks = [ridge_solution(moments, 0.03, at_once=2 * N_FF, sweeps=sweeps) for sweeps in (1, 4, 30)]
    distance = [np.abs(found - at_once).max() for found in in_blocks]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 1e-9
    begun = ridge_solution(moments, 0.03, at_once=2 * N_FF, sweeps=1, start=at_once)
    np.testing.assert_allclose(begun, at_once, atol=1e-9)


def test_a_sample_measures_what_is_left() -> None:
    ids, features, target = tokens(6)
    correction = np.random.default_rng(7).standard_normal((N_EXPERT * N_FF, N_EMBD))
    left = target - dense(ids, features) @ correction
    sample = Sample(N)
    sample.add(ids, features, target)
    np.testing.assert_allclose(sample.error(correction), np.square(left).sum() / N, rtol=1e-5)
    np.testing.assert_allclose(apply(correction, ids, features), dense(ids, features) @ correction, atol=1e-4)
    small = Sample(100)
    small.add(ids, features, target)
    assert small.n == 100
    np.testing.assert_allclose(small.error(correction), np.square(left[:100]).sum() / 100, rtol=1e-5)


def test_gains_are_those_of_least_squares() -> None:
    """Targets are what experts with other gains would add: these are found, whatever the projections."""
    ids, features, _ = tokens(8)
    rng = np.random.default_rng(9)
    original = rng.standard_normal((N_EXPERT * N_FF, N_EMBD)).astype(np.float32)
    wanted = rng.uniform(0.5, 2, N_EXPERT)
    correction = original * (np.repeat(wanted, N_FF) - 1)[:, None]
    moments = moments_of(ids, features, apply(correction, ids, features))
    moments.close()
    np.testing.assert_allclose(gains(moments, original, original, 1e-9), wanted, atol=1e-4)
    np.testing.assert_allclose(gains(moments, original, 2 * original, 1e-9), wanted / 2, atol=1e-4)
    held = gains(moments, original, original, 1e6)
    np.testing.assert_allclose(held, 1, atol=1e-4)


def test_an_expert_that_no_token_chose_is_left_as_it_is() -> None:
    ids, features, target = tokens(10)
    ids[ids == 4] = 5  # a token that chose both: the later slot counts, as in the dense matrix
    first = ids[:, 0:1]
    moments = Moments(N_EXPERT, N_FF, N_EMBD)
    moments.add(first, features[:, 0:1], target)
    moments.close()
    found = ridge_solution(moments, 0.01)
    assert not found[4 * N_FF : 5 * N_FF].any()
    np.testing.assert_array_equal(gains(moments, found + 1, found + 1, 0.02)[4], 1)
