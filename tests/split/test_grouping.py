"""What holds for groups of any mode, and the order in which each mode deals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshard import MoeshardError
from moeshard.keep.text import Keep, format_row
from moeshard.planning.deal import MODES, group_experts
from moeshard.profile.ranking import Ranking


def ranking_of(*rows: Any) -> Ranking:
    return Ranking(np.array(rows, dtype=np.float64), "test.csv")


def deal(mode: str, n_groups: int, scores: Any, **options: Any) -> list[str]:
    """Group one layer; return what each group holds."""
    ranking = ranking_of(scores)
    return [
        format_row(keep[0]) for keep in group_experts(mode, n_groups, 1, len(scores), [0], ranking=ranking, **options)
    ]


@st.composite
def cases(draw: st.DrawFn, modes: tuple[str, ...] = MODES) -> dict[str, Any]:
    routing_groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    per_routing_group = draw(st.integers(1, 12))
    n_expert = routing_groups * per_routing_group
    n_layer = draw(st.integers(1, 4))
    moe_layers = sorted(draw(st.sets(st.integers(0, n_layer - 1), min_size=1)))
    # Small whole numbers: many ties, and sums that are exact.
    score = st.integers(0, 9)
    rows = [draw(st.lists(score, min_size=n_expert, max_size=n_expert)) for _ in range(n_layer)]
    scores = np.array(rows, dtype=np.float64)
    unscored = draw(st.sets(st.integers(0, n_layer - 1), max_size=n_layer - 1))
    scores[sorted(unscored)] = np.nan
    return {
        "mode": draw(st.sampled_from(modes)),
        "n_groups": draw(st.integers(1, per_routing_group)),
        "n_layer": n_layer,
        "n_expert": n_expert,
        "moe_layers": moe_layers,
        "ranking": Ranking(scores, "drawn"),
        "replicate": routing_groups * draw(st.integers(0, per_routing_group)),
        "expert_groups": routing_groups,
    }


@given(cases())
def test_groups_divide_every_layer(case: dict[str, Any]) -> None:
    keeps = group_experts(**case)
    n_groups, n_expert, routing_groups = case["n_groups"], case["n_expert"], case["expert_groups"]
    assert len(keeps) == n_groups
    assert all(keep.shape == (case["n_layer"], n_expert) and keep.dtype == bool for keep in keeps)
    dense = sorted(set(range(case["n_layer"])) - set(case["moe_layers"]))
    assert all(keep[dense].all() for keep in keeps)

    routed = np.stack(keeps)[:, case["moe_layers"]]  # (group, MoE layer, expert)
    holders = routed.sum(axis=0)
    everywhere = (holders == n_groups).sum(axis=1)
    assert ((holders == 1) | (holders == n_groups)).all()
    assert (everywhere == (n_expert if n_groups == 1 else case["replicate"])).all()

    counts = routed.reshape(*routed.shape[:2], routing_groups, -1).sum(axis=3)
    assert (counts == counts[:, :1, :1]).all()  # the same in every layer and routing group
    assert np.ptp(counts[:, 0, 0]) <= 1


@given(cases())
def test_replicated_experts_are_the_best(case: dict[str, Any]) -> None:
    keeps = np.stack(group_experts(**case))
    scores = case["ranking"].scores
    if case["n_groups"] == 1:
        return
    for layer in case["moe_layers"]:
        if np.isnan(scores[layer]).any():
            continue
        in_all = keeps[:, layer].all(axis=0).reshape(case["expert_groups"], -1)
        for held, score in zip(in_all, scores[layer].reshape(in_all.shape), strict=True):
            if held.any() and not held.all():
                assert score[held].min() >= score[~held].max()


@given(cases(modes=("balanced",)))
def test_balanced_loads_differ_by_no_more_than_one_score(case: dict[str, Any]) -> None:
    case["replicate"] = 0
    keeps = np.stack(group_experts(**case))
    if case["expert_groups"] > 1 and len({int(keep[case["moe_layers"][0]].sum()) for keep in keeps}) > 1:
        return  # groups with one expert more in each routing group hold more on purpose
    for layer in case["moe_layers"]:
        scores = case["ranking"].scores[layer]
        if not np.isnan(scores).any():
            assert np.ptp(keeps[:, layer] @ scores) <= scores.max()


@given(cases(modes=("tiers",)))
def test_tiers_go_from_best_to_worst(case: dict[str, Any]) -> None:
    case["replicate"] = 0
    keeps = group_experts(**case)
    for layer in case["moe_layers"]:
        scores = case["ranking"].scores[layer].reshape(case["expert_groups"], -1)
        if not np.isnan(scores).any():
            held = [keep[layer].reshape(scores.shape) for keep in keeps]
            for better, worse in pairwise(held):
                for row, upper, lower in zip(scores, better, worse, strict=True):
                    assert row[upper].min() >= row[lower].max()


@given(cases())
def test_order_of_equal_scores_is_that_of_ids(case: dict[str, Any]) -> None:
    case["ranking"] = Ranking(np.ones((case["n_layer"], case["n_expert"])), "equal")
    once, again = group_experts(**case), group_experts(**case)
    assert np.array_equal(once, again)
    if case["mode"] in ("contiguous", "tiers"):
        case["ranking"] = None if not case["replicate"] else case["ranking"]
        assert np.array_equal(once, group_experts(**case | {"mode": "contiguous"}))


def test_contiguous() -> None:
    def held(keeps: list[Keep]) -> list[str]:
        return [format_row(keep[1]) for keep in keeps]

    assert held(group_experts("contiguous", 3, 2, 8, [1])) == ["0-2", "3-5", "6-7"]
    assert held(group_experts("balanced", 3, 2, 8, [1])) == ["0-2", "3-5", "6-7"]
    assert held(group_experts("contiguous", 1, 2, 8, [1])) == ["all"]
    assert held(group_experts("contiguous", 8, 2, 8, [1])) == list("01234567")
    assert held(group_experts("contiguous", 2, 2, 8, [1], expert_groups=2)) == ["0-1,4-5", "2-3,6-7"]
    assert held(group_experts("contiguous", 2, 2, 6, [1], expert_groups=2)) == ["0-1,3-4", "2,5"]
    assert held(group_experts("contiguous", 2, 2, 4, [1], expert_groups=0)) == ["0-1", "2-3"]


def test_tiers_by_hand() -> None:
    assert deal("tiers", 3, [1, 5, 3, 0, 4, 2, 3]) == ["1-2,4", "5-6", "0,3"]
    assert deal("tiers", 2, [1, 5, 3, 0, 4, 2, 3, 9], expert_groups=2) == ["1-2,4,7", "0,3,5-6"]


def test_snake() -> None:
    # By score: 7 6 5 4 3 2 1 0 8, to groups 0 1 2 2 1 0 0 1 2.
    assert deal("snake", 3, [1, 2, 3, 4, 5, 6, 7, 8, 0]) == ["1-2,7", "0,3,6", "4-5,8"]
    # The second round is cut short, and starts at the last group.
    assert deal("snake", 3, [9, 8, 7, 6]) == ["0", "1", "2-3"]


def test_balanced() -> None:
    assert deal("balanced", 2, [7, 6, 5, 4, 3, 1]) == ["0,3-4", "1-2,5"]
    # The last expert goes where there is room, though that group is the heavier one.
    assert deal("balanced", 2, [1, 10, 1, 1]) == ["1,3", "0,2"]
    # What the first routing group leaves uneven, 9 and 1, the second evens out.
    assert deal("balanced", 2, [9, 1, 8, 2], expert_groups=2) == ["0,3", "1-2"]


def test_replicated() -> None:
    assert deal("contiguous", 2, [0, 9, 1, 8, 2, 3], replicate=2) == ["0-3", "1,3-5"]
    assert deal("snake", 2, [0, 9, 1, 8, 2, 3], replicate=2) == ["0-1,3,5", "1-4"]
    assert deal("tiers", 2, [0, 9, 1, 8], replicate=2, expert_groups=2) == ["all", "1,3"]
    assert deal("balanced", 2, [0, 9], replicate=2) == ["all", "all"]


def test_layers_without_scores_are_dealt_contiguous_with_the_same_sizes() -> None:
    ranking = ranking_of([3, 2, 1, 0, 9], [np.nan] * 5)
    keeps = group_experts("snake", 3, 2, 5, [0, 1], ranking=ranking, replicate=1)
    assert [format_row(keep[0]) for keep in keeps] == ["0,4", "1,4", "2-4"]
    assert [format_row(keep[1]) for keep in keeps] == ["0-1", "0,2", "0,3-4"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "best"}, "unknown mode 'best'; the modes are contiguous, balanced, tiers, snake"),
        ({"mode": "tiers"}, "'tiers' needs .* --ranking FILE"),
        ({"mode": "snake"}, "'snake' needs .* --ranking FILE"),
        ({"replicate": 1}, "replicating .* --ranking FILE"),
        ({"n_groups": 0}, "cannot make 0 groups: the model has 8 experts per layer; ask for 1 to 8"),
        ({"n_groups": 9}, "cannot make 9 groups"),
        ({"n_groups": 3, "expert_groups": 4}, "2 experts per layer in each of its 4 routing groups; ask for 1 to 2"),
        ({"expert_groups": 3}, "8 experts cannot form 3 equal routing groups"),
        ({"replicate": 9, "ranking": ranking_of([1] * 8)}, "cannot replicate 9 experts of 8 per layer; write 0 to 8"),
        ({"replicate": -1, "ranking": ranking_of([1] * 8)}, "cannot replicate -1"),
        ({"replicate": 3, "expert_groups": 2, "ranking": ranking_of([1] * 8)}, "2 routing groups .* write 2 or 4"),
        ({"ranking": ranking_of([1] * 4)}, "test.csv: ranks 4 experts in 1 layers, but the model has 8 in 1"),
        ({"n_expert": 0}, "dense"),
        ({"moe_layers": []}, "dense"),
    ],
)
def test_errors(options: dict[str, Any], said: str) -> None:
    good: dict[str, Any] = {"mode": "contiguous", "n_groups": 2, "n_layer": 1, "n_expert": 8, "moe_layers": [0]}
    assert len(group_experts(**good)) == 2
    with pytest.raises(MoeshardError, match=said):
        group_experts(**good | options)
