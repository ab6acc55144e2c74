"""Scores of losses: means and intervals against cases whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moeshard import MoeshardError
from moeshard.evaluation.losses import Losses
from moeshard.evaluation.scores import Scorer, scores_from_json
from moeshard.profile.intervals import estimate, student_quantile


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
    # The four windows of the first domain are half of the weight: 4 % of their tokens are 2 % of all.
    groups[0, :4, 1:5] = 7
    scorer = Scorer(losses_of(full, groups, [0] * 4 + [1] * 16))
    scores = scorer.group(0)
    assert scores.agreement is not None and scores.agreement.kl_p99 == 7
    assert [own.agreement.kl_p99 for own in scores.domains.values() if own.agreement] == [7, 0]
    groups[0, :4, 2:5] = 0
    scores = Scorer(losses_of(full, groups, [0] * 4 + [1] * 16)).group(0)
    assert scores.agreement is not None and scores.agreement.kl_p99 == 0


def test_regret_and_right() -> None:
    full = np.zeros((8, 3))
    groups = np.zeros((2, 8, 3))
    groups[1, :, 1:] = np.repeat([0.5, -1], 4)[:, None]
    scorer = Scorer(losses_of(full, groups, [0] * 4 + [1] * 4))
    half_wrong = np.array([1, 0, 0, 1] * 2)
    regret, (low, high) = scorer.regret(half_wrong)
    # It is never less than 0, and an interval says so.
    assert regret == pytest.approx((0.25 + 0.5) / 2) and low == 0 and high > 0.75
    assert scorer.right(half_wrong) == 0.5
    best = np.repeat([0, 1], 4)
    assert scorer.right(best) == 1 and scorer.regret(best) == (0, (0, 0))


def test_intervals_of_many_windows_are_those_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(1)
    windows = rng.normal(3, 1, size=2000)
    full = np.repeat(windows[:, None], 3, axis=1)
    scores = Scorer(losses_of(full, full[None], [0] * 1000 + [1] * 1000)).full()
    error = np.sqrt(sum(part.var(ddof=1) / 1000 for part in (windows[:1000], windows[1000:]))) / 2
    wanted = (windows.mean() - 1.96 * error, windows.mean() + 1.96 * error)
    assert scores.nll_ci == pytest.approx(wanted, abs=0.01 * error)
    own = scores.domains["domain-0"]
    half = 1.96 * windows[:1000].std(ddof=1) / np.sqrt(1000)
    mean = windows[:1000].mean()
    assert own.nll_ci == pytest.approx((mean - half, mean + half), abs=0.01 * half)
    narrow = Scorer(losses_of(full, full[None], [0] * 2000), confidence=0.5).full()
    assert narrow.nll_ci[1] - narrow.nll_ci[0] < 0.5 * (scores.nll_ci[1] - scores.nll_ci[0])


@pytest.mark.parametrize(("freedom", "probability"), [(1, 0.9), (3, 0.975), (3, 0.25), (7.3, 0.995), (1000, 0.975)])
def test_quantiles_are_those_of_student(freedom: float, probability: float) -> None:
    from scipy import stats

    assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-4)


@pytest.mark.parametrize("n_windows", [4, 8, 16])
@pytest.mark.parametrize("n_domains", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(n_windows: int, n_domains: int) -> None:
    """Percentiles of a bootstrap held it 80 % of the time with 4 windows, 90 % with 8."""
    trials = 2000
    rng = np.random.default_rng(n_windows)
    spread = np.repeat(np.arange(1.0, n_domains + 1), n_windows)[:, None]
    values = 3 + spread * rng.standard_normal((n_windows * n_domains, trials))
    rows = np.split(np.arange(n_windows * n_domains), n_domains)
    low, high = estimate(values, rows).interval(0.95)
    held = ((low <= 3) & (high >= 3)).mean()
    # Three standard deviations of such a share. With several domains the distribution is Student's nearly, and a
    # little on the safe side.
    assert abs(held - 0.95) < 3 * np.sqrt(0.95 * 0.05 / trials) + (0.01 if n_domains > 1 else 0)
    # And it is these that figures have.
    column = np.repeat(values[:, :1], 3, axis=1)
    owner = np.repeat(np.arange(n_domains), n_windows).tolist()
    scores = Scorer(losses_of(column, column[None], owner)).full()
    assert scores.nll_ci == pytest.approx((low[0], high[0]), rel=1e-5)


def test_figures_stay_within_what_they_can_be() -> None:
    full = np.zeros((4, 3))
    groups = np.zeros((1, 4, 3))
    groups[0, 0, 1:] = 5
    scores = Scorer(losses_of(full, groups, [0] * 4)).group(0)
    assert scores.agreement is not None and scores.agreement.kl_ci[0] == 0 and scores.agreement.top1_ci[1] == 1
    assert scores.excess_ci[0] < 0


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(3)
    full = np.repeat(rng.normal(3, 1, size=(40, 1)), 4, axis=1)
    scores = Scorer(losses_of(full, full[None] + 0.2, [0] * 40)).group(0)
    assert scores.nll_ci[1] - scores.nll_ci[0] > 0.3
    assert scores.excess_ci == pytest.approx((0.2, 0.2), abs=1e-5)
    assert scores.ratio_ci == pytest.approx((np.exp(0.2),) * 2, abs=1e-5)


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
    full = np.ones((7, 4))
    with pytest.raises(MoeshardError, match=r"'domain-1' has 3 windows of 5 tokens.* 4 or more.*or a smaller window"):
        Scorer(losses_of(full, full[None], [0] * 4 + [1] * 3))
    for confidence in (0.0, 1.0):
        with pytest.raises(MoeshardError, match="confidence must be"):
            Scorer(losses_of(full, full[None], [0] * 7), confidence=confidence)
