"""Scores of losses: means and intervals against cases whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moeshard import MoeshardError
from moeshard.evaluation.losses import Losses
from moeshard.evaluation.scores import Scorer, scores_from_json


def losses_of(full: np.ndarray, groups: np.ndarray, domain: list[int], n_prompt: int = 1) -> Losses:
    """Losses of full (S, T) and groups (G, S, T); KL and agreement follow from them."""
    return Losses(
        domains=[f"domain-{index}" for index in range(max(domain) + 1)],
        domain=np.array(domain),
        n_prompt=n_prompt,
        full=full.astype(np.float32),
        groups=groups.astype(np.float32),
        kl=np.abs(groups - full).astype(np.float32),
        same=np.abs(groups - full) < 0.5,
        captured=np.zeros(groups.shape[:2]),
    )


def random_losses(seed: int = 0) -> Losses:
    rng = np.random.default_rng(seed)
    full = rng.gamma(2.0, size=(30, 12))
    return losses_of(full, full + rng.normal(0.4, 0.6, size=(3, 30, 12)), [0] * 6 + [1] * 24, n_prompt=4)


def test_means_are_those_of_a_loop() -> None:
    losses = random_losses()
    scorer = Scorer(losses)
    node = losses.placement("loss")
    found = {"full": scorer.full(), "placed": scorer.placed(node), "hashed": scorer.hashed()}
    values: dict[str, list[list[float]]] = {name: [[], []] for name in found}
    same: list[list[float]] = [[], []]
    for window, domain in enumerate(losses.domain):
        values["full"][domain].append(np.mean(losses.full[window, 4:]))
        values["placed"][domain].append(np.mean(losses.groups[node[window], window, 4:]))
        values["hashed"][domain].append(np.mean([losses.groups[g, window, 4:] for g in range(3)]))
        same[domain].append(np.mean(losses.same[node[window], window, 4:]))
    for name, scores in found.items():
        means = [np.mean(values[name][domain]) for domain in (0, 1)]
        assert scores.nll == pytest.approx(np.mean(means), rel=1e-6)
        assert scores.perplexity == pytest.approx(np.exp(np.mean(means)), rel=1e-6)
        assert [own.nll for own in scores.domains.values()] == pytest.approx(means, rel=1e-6)
        assert scores.excess == pytest.approx(scores.nll - found["full"].nll, abs=1e-6)
        assert scores.quality == pytest.approx(1 / scores.ratio)
        assert scores.nll_ci[0] < scores.nll < scores.nll_ci[1]
    agreement = found["placed"].agreement
    assert agreement is not None and found["full"].agreement is None
    assert agreement.top1 == pytest.approx(np.mean([np.mean(own) for own in same]))
    groups = [scorer.group(index) for index in range(3)]
    assert found["hashed"].nll == pytest.approx(np.mean([own.nll for own in groups]))
    parts = [own.agreement for own in (*groups, found["hashed"]) if own.agreement is not None]
    for key in ("kl", "kl_p99", "top1"):
        assert getattr(parts[-1], key) == pytest.approx(np.mean([getattr(own, key) for own in parts[:-1]]))


def test_a_node_that_predicts_as_the_whole_model_loses_nothing() -> None:
    losses = random_losses()
    same = losses_of(losses.full, np.stack([losses.full] * 2), losses.domain.tolist(), 4)
    scorer = Scorer(same)
    for scores in (scorer.group(0), scorer.hashed(), scorer.placed(same.placement("oracle"))):
        assert scores.excess == 0 and scores.excess_ci == (0, 0) and scores.ratio == scores.quality == 1
        assert scores.agreement is not None and scores.agreement.kl == 0
        assert scores.agreement.top1 == pytest.approx(1)
    # Both are best: whichever a session is on, it is right.
    assert scorer.right(np.ones(30, dtype=np.int64)) == 1
    assert scorer.regret(np.ones(30, dtype=np.int64)) == (0, (0, 0))


def test_percentile_is_over_tokens_and_domains_count_alike() -> None:
    full = np.zeros((20, 101))
    groups = np.zeros((1, 20, 101))
    # The two windows of the first domain are half of the weight: 4 % of their tokens are 2 % of all.
    groups[0, :2, 1:5] = 7
    scorer = Scorer(losses_of(full, groups, [0, 0] + [1] * 18))
    scores = scorer.group(0)
    assert scores.agreement is not None and scores.agreement.kl_p99 == 7
    assert [own.agreement.kl_p99 for own in scores.domains.values() if own.agreement] == [7, 0]
    groups[0, :2, 2:5] = 0
    scores = Scorer(losses_of(full, groups, [0, 0] + [1] * 18)).group(0)
    assert scores.agreement is not None and scores.agreement.kl_p99 == 0


def test_regret_and_right() -> None:
    full = np.zeros((4, 3))
    groups = np.zeros((2, 4, 3))
    groups[1, :, 1:] = np.array([0.5, 0.5, -1, -1])[:, None]
    scorer = Scorer(losses_of(full, groups, [0, 0, 1, 1]))
    regret, (low, high) = scorer.regret(np.array([1, 0, 0, 1]))
    assert regret == pytest.approx((0.25 + 0.5) / 2) and low == pytest.approx(0) and high == pytest.approx(0.75)
    assert scorer.right(np.array([1, 0, 0, 1])) == 0.5
    assert scorer.right(np.array([0, 0, 1, 1])) == 1 and scorer.regret(np.array([0, 0, 1, 1]))[0] == 0


def test_intervals_are_those_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(1)
    windows = rng.normal(3, 1, size=200)
    full = np.repeat(windows[:, None], 3, axis=1)
    scores = Scorer(losses_of(full, full[None], [0] * 100 + [1] * 100), resamples=20000).full()
    error = np.sqrt(sum(part.var(ddof=1) / 100 for part in (windows[:100], windows[100:]))) / 2
    assert scores.nll_ci == pytest.approx(
        (windows.mean() - 1.96 * error, windows.mean() + 1.96 * error), abs=0.1 * error
    )
    own = scores.domains["domain-0"]
    half = 1.96 * windows[:100].std(ddof=1) / 10
    assert own.nll_ci == pytest.approx((windows[:100].mean() - half, windows[:100].mean() + half), abs=0.1 * half)
    narrow = Scorer(losses_of(full, full[None], [0] * 200), confidence=0.5).full()
    assert narrow.nll_ci[1] - narrow.nll_ci[0] < 0.5 * (scores.nll_ci[1] - scores.nll_ci[0])


def test_spread_of_few_windows_is_not_too_small() -> None:
    # Drawing as many windows as there are would give the standard error times sqrt((n - 1) / n), here 0.71.
    full = np.array([[0.0, 0.0], [1.0, 1.0]] * 5)
    scorer = Scorer(losses_of(full, full[None], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), resamples=20000)
    spread = (scorer._draws @ full[:, 1] / 5).std()
    assert spread == pytest.approx(np.sqrt(0.5 / 2) / np.sqrt(5), rel=0.03)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for trial in range(200):
        full = np.repeat(rng.normal(3, 1, size=(40, 1)), 2, axis=1)
        low, high = Scorer(losses_of(full, full[None], [0] * 20 + [1] * 20), seed=trial).full().nll_ci
        held += low <= 3 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(3)
    full = np.repeat(rng.normal(3, 1, size=(40, 1)), 4, axis=1)
    scores = Scorer(losses_of(full, full[None] + 0.2, [0] * 40)).group(0)
    assert scores.nll_ci[1] - scores.nll_ci[0] > 0.3
    assert scores.excess_ci == pytest.approx((0.2, 0.2), abs=1e-5)
    assert scores.ratio_ci == pytest.approx((np.exp(0.2),) * 2, abs=1e-5)


def test_the_seed_decides() -> None:
    losses = random_losses()
    first, again, other = (Scorer(losses, seed=seed).hashed().to_json() for seed in (1, 1, 2))
    assert first == again != other


def test_json_comes_back() -> None:
    scorer = Scorer(random_losses())
    for scores in (scorer.full(), scorer.group(1)):
        text = json.dumps(scores.to_json(), allow_nan=False)
        assert scores_from_json(json.loads(text), "groups[1]") == scores
    value = scorer.group(1).to_json()
    assert {"ratio", "ratio_ci", "kl_p99", "top1_ci", "perplexity"} <= set(value)
    assert "ratio" not in scorer.full().to_json()
    value["domains"]["domain-1"]["nll_ci"] = [2, 1]
    with pytest.raises(MoeshardError, match=r"groups\[1\]\.domains\.domain-1\.nll_ci: expected \[low, high\]"):
        scores_from_json(value, "groups[1]")
    del value["domains"]["domain-1"]["nll_ci"]
    with pytest.raises(MoeshardError, match=r"groups\[1\]\.domains\.domain-1\.nll_ci: is missing"):
        scores_from_json(value, "groups[1]")


def test_what_has_no_interval_is_refused() -> None:
    full = np.ones((3, 4))
    with pytest.raises(MoeshardError, match=r"'domain-1' has 1 window of 5 tokens.*more text, or a smaller window"):
        Scorer(losses_of(full, full[None], [0, 0, 1]))
    for options in ({"resamples": 1}, {"confidence": 1.0}, {"confidence": 0.0}):
        with pytest.raises(MoeshardError, match="resamples must be"):
            Scorer(losses_of(full, full[None], [0, 0, 0]), **options)  # type: ignore[arg-type]
