"""Sequences that are nearly the same, taken as one: that groups are those, and that plans are as good."""

from __future__ import annotations

import numpy as np
import pytest
from test_planner import profile_of

from moeshard.planning.condensed import condense, losses
from moeshard.planning.cosaliency import contributions
from moeshard.planning.islands import islands
from moeshard.profile.record import Profile

N_KINDS, N_COPIES = 12, 5


def copies(seed: int, noise: float) -> tuple[Profile, np.ndarray]:
    """Several sequences of each of some kinds, which differ by this part, in two domains; and their kinds."""
    rng = np.random.default_rng(seed)
    kinds = np.repeat(np.arange(N_KINDS), N_COPIES)
    saliency = rng.gamma(0.5, size=(N_KINDS, 3, 24))[kinds]
    saliency *= 1 + noise * rng.standard_normal(saliency.shape)
    order = rng.permutation(kinds.size)
    return profile_of(saliency[order], (kinds[order] % 2).tolist(), 24), kinds[order]


def in_order(profile: Profile) -> np.ndarray:
    return np.argsort(profile.domain, kind="stable")


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_of_the_same_kind(seed: int) -> None:
    profile, kinds = copies(seed, 1e-3)
    sequences = in_order(profile)
    weights = np.random.default_rng(seed).random(sequences.size)
    found = condense(profile, sequences, weights, N_KINDS)
    for kind in range(N_KINDS):
        assert np.unique(found.group[kinds[sequences] == kind]).size == 1
    assert found.weights.size == N_KINDS
    np.testing.assert_allclose(found.weights, [weights[found.group == i].sum() for i in range(N_KINDS)])
    # What stands for a group loses what its sequences do.
    each = contributions(profile, sequences)
    for keep in np.random.default_rng(seed).random((10, 3, 24)) < 0.4:
        np.testing.assert_allclose(found.parts.lost(keep)[found.group], each.lost(keep), rtol=0.02)
        np.testing.assert_allclose(losses(profile, sequences, [keep])[:, 0], each.lost(keep), rtol=1e-4)
    products = [parts.products(weights) for parts, weights in ((found.parts, found.weights), (each, weights))]
    np.testing.assert_allclose(*products, rtol=0.01, atol=1e-4 * products[0].max())


def test_few_sequences_are_left_as_they_are() -> None:
    profile, _ = copies(0, 0.1)
    sequences = in_order(profile)
    found = condense(profile, sequences, np.ones(60), 60)
    assert found.group.tolist() == list(range(60))
    np.testing.assert_array_equal(found.parts.roots, contributions(profile, sequences).roots)


def test_plans_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, grouped = [], []
    for seed in range(12):
        profile, _ = copies(seed, 0.1)
        monkeypatch.undo()
        whole.append(islands(profile, [8, 8]).lost)
        monkeypatch.setattr("moeshard.planning.islands.GROUPS", 20)
        found = islands(profile, [8, 8])
        grouped.append(found.lost)
        # Said of the sequences themselves, each where it loses least.
        sequences = in_order(profile)
        each = losses(profile, sequences, found.keeps)
        np.testing.assert_array_equal(found.owner[sequences], each.argmin(axis=1))
        weights = 1 / np.bincount(profile.domain)[profile.domain[sequences]] / 2
        assert found.lost == pytest.approx(each.min(axis=1) @ weights)
    # Searches from other beginnings end some 4 % apart, either way.
    assert sum(grouped) < 1.03 * sum(whole)


def test_a_domain_of_which_nothing_was_measured() -> None:
    profile, _ = copies(1, 0.1)
    profile.n_tokens[profile.domain == 0] = 0
    found = islands(profile, [8, 8])
    assert (found.owner[profile.domain == 0] == -1).all() and (found.owner[profile.domain == 1] >= 0).all()
