"""What is lost by experts that are dropped together: against every token, and on traffic whose best answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeshard.gguf.identity import ModelIdentity
from moeshard.planning.cosaliency import contributions, least_lost
from moeshard.profile.record import Profile


def profile_of_tokens(tokens: np.ndarray, domain: list[int]) -> Profile:
    """A profile of sequences whose tokens have these contributions (S, T, M, E)."""
    s, t, m, e = tokens.shape
    d = max(domain) + 1
    products = np.einsum("stma,stmb->smab", tokens, tokens)
    return Profile(
        model=ModelIdentity("made up", "qwen3moe", "0" * 64, m, e, list(range(m))),
        domains=[f"domain-{i}" for i in range(d)],
        layers=np.arange(m, dtype=np.int32),
        domain=np.array(domain, dtype=np.int32),
        n_tokens=np.full(s, t, dtype=np.int32),
        count=(tokens > 0).sum(axis=1).astype(np.int32),
        mass=tokens.sum(axis=1).astype(np.float32),
        saliency=tokens.sum(axis=1).astype(np.float32),
        energy=(tokens**2).sum(axis=1).astype(np.float32),
        entropy=np.ones((s, m), dtype=np.float32),
        peak=np.ones((d, m, e), dtype=np.float32),
        together=np.zeros((d, m, e, e), dtype=np.int32),
        cosaliency=np.stack([products[np.array(domain) == i].sum(axis=0) for i in range(d)]).astype(np.float32),
    )


@pytest.fixture
def tokens() -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.gamma(1.0, size=(2, 50, 3, 10))
    return values * (rng.random(values.shape) < 0.3)


def test_lost_is_the_square_of_what_each_token_misses(tokens: np.ndarray) -> None:
    # With one sequence in each domain nothing is approximated.
    parts = contributions(profile_of_tokens(tokens, [0, 1]), np.arange(2))
    rng = np.random.default_rng(1)
    for keep in rng.random((20, 3, 10)) < 0.5:
        missed = (tokens * ~keep).sum(axis=3) ** 2
        whole = tokens.sum(axis=3) ** 2
        wanted = (missed.sum(axis=1) / whole.sum(axis=1)).mean(axis=1)
        np.testing.assert_allclose(parts.lost(keep), wanted, rtol=1e-4)
    assert parts.lost(np.ones((3, 10), dtype=bool)).tolist() == [0, 0]
    np.testing.assert_allclose(parts.lost(np.zeros((3, 10), dtype=bool)), 1, rtol=1e-5)


def test_products_are_what_lost_sums_up(tokens: np.ndarray) -> None:
    parts = contributions(profile_of_tokens(tokens, [0, 1]), np.arange(2))
    weights = np.array([0.25, 0.75])
    keep = np.random.default_rng(2).random((3, 10)) < 0.5
    dropped = (~keep).astype(float)
    form = np.einsum("ma,mab,mb->", dropped, parts.products(weights), dropped)
    assert form == pytest.approx(parts.lost(keep) @ weights, rel=1e-4)


def test_as_good_as_the_best_of_all_choices(tokens: np.ndarray) -> None:
    products = contributions(profile_of_tokens(tokens, [0, 1]), np.arange(2)).products(np.ones(2) / 2)
    keep = least_lost(products, 4, np.zeros((3, 10), dtype=bool))
    assert keep.sum(axis=1).tolist() == [4, 4, 4]
    for row in range(3):
        found = products[row][np.ix_(~keep[row], ~keep[row])].sum()
        others = [products[row][np.ix_(out, out)].sum() for out in map(list, itertools.combinations(range(10), 6))]
        assert found <= 1.02 * min(others)


def test_every_token_keeps_something_rather_than_some_everything() -> None:
    # Tokens of one kind use experts 0 and 1, those of the other 2 and 3, which contribute less.
    tokens = np.zeros((1, 100, 1, 4))
    tokens[0, :50, 0, :2], tokens[0, 50:, 0, 2:] = 1.1, 1.0
    products = contributions(profile_of_tokens(tokens, [0]), np.arange(1)).products(np.ones(1))
    keep = least_lost(products, 2, np.zeros((1, 4), dtype=bool))[0]
    assert np.argsort(-tokens.sum(axis=(0, 1, 2)), kind="stable")[:2].tolist() == [0, 1], "what each alone says"
    assert keep[:2].sum() == 1 and keep[2:].sum() == 1


def test_protected_experts_stay(tokens: np.ndarray) -> None:
    products = contributions(profile_of_tokens(tokens, [0, 1]), np.arange(2)).products(np.ones(2) / 2)
    protected = np.zeros((3, 10), dtype=bool)
    protected[:, [3, 8]] = True
    assert least_lost(products, 4, protected)[:, [3, 8]].all()
    # More than there is room for: those of most squares.
    keep = least_lost(products, 4, np.ones((3, 10), dtype=bool))
    assert keep.sum(axis=1).tolist() == [4, 4, 4]


def test_layers_that_need_more_get_more(tokens: np.ndarray) -> None:
    tokens[:, :, 1, 2:] *= 0.01  # two experts do nearly all in this layer
    products = contributions(profile_of_tokens(tokens, [0, 1]), np.arange(2)).products(np.ones(2) / 2)
    none = np.zeros((3, 10), dtype=bool)
    even, free = least_lost(products, 5, none), least_lost(products, 5, none, fewest=2)
    assert free.sum() == even.sum() == 15
    assert free.sum(axis=1)[1] < 5 and free.sum(axis=1).min() >= 2

    def lost(keep: np.ndarray) -> float:
        return float(np.einsum("ma,mab,mb->", (~keep).astype(float), products, (~keep).astype(float)))

    assert lost(free) < lost(even)


def one_after_the_other(products: np.ndarray, size: int, protected: np.ndarray, fewest: int) -> np.ndarray:
    """Of all layers together, the expert is dropped that costs least beside those dropped before, again and again."""
    n_layer, n_expert, _ = products.shape
    own = np.einsum("mee->me", products)
    dropped = np.zeros(own.shape, dtype=bool)
    for _ in range((n_expert - size) * n_layer):
        cost = own + 2 * np.einsum("mab,mb->ma", products, dropped)
        cost[dropped | protected] = np.inf
        cost[dropped.sum(axis=1) >= n_expert - fewest] = np.inf
        dropped[np.unravel_index(cost.argmin(), cost.shape)] = True
    return ~dropped


@pytest.mark.parametrize("seed", range(20))
def test_layers_that_drop_by_themselves_drop_what_they_would_together(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeshard.planning.cosaliency._exchange", lambda *_: None)  # which comes after that
    rng = np.random.default_rng(seed)
    n_layer, n_expert = rng.integers(1, 6), rng.integers(4, 20)
    tokens = rng.gamma(0.4, size=(30, n_layer, n_expert)) * rng.gamma(2, size=(n_layer, 1))
    products = np.einsum("tma,tmb->mab", tokens, tokens).astype(np.float32)
    size = int(rng.integers(2, n_expert))
    fewest = int(rng.integers(1, size + 1))
    protected = np.cumsum(rng.random((n_layer, n_expert)) < 0.1, axis=1) == 1  # no more than fit
    protected &= np.cumsum(protected, axis=1) <= size
    wanted = one_after_the_other(products.astype(np.float64), size, protected, fewest)
    np.testing.assert_array_equal(least_lost(products, size, protected, fewest), wanted)


def test_a_layer_without_contributions_is_no_error() -> None:
    tokens = np.zeros((1, 10, 2, 6))
    tokens[0, :, 0] = 1
    parts = contributions(profile_of_tokens(tokens, [0]), np.arange(1))
    keep = least_lost(parts.products(np.ones(1)), 3, np.zeros((2, 6), dtype=bool))
    assert keep.sum(axis=1).tolist() == [3, 3]
    assert np.isfinite(parts.lost(keep)).all()
