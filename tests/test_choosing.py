"""Nodes whose layers hold different numbers of experts: the choice, its memory, and `moeshard plan --per-layer`."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import profile_of, two_kinds

import moeshard
from moeshard import GGUFMap, MoeshardError, _core
from moeshard.planning.budget import Memory, Use, fit, shard_memory
from moeshard.planning.cosaliency import contributions
from moeshard.planning.islands import Begun, islands
from moeshard.planning.planner import PER_LAYER_STRATEGIES, STRATEGY_NAMES, choose_experts, make_plan
from moeshard.planning.strategies import across_layers
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile
from moeshard.profile.statistics import captured
from moeshard.traffic.domains import embedded_traffic


def shares_of(scores: np.ndarray, keep: np.ndarray) -> float:
    return float((scores / scores.sum(axis=1, keepdims=True) * keep).sum())


def test_a_layer_that_few_experts_carry_gives_its_places_to_others() -> None:
    peaked, even = np.array([100.0, 1, 1, 1]), np.ones(4)
    keep = across_layers(np.stack([peaked, even]), 2)
    assert keep.tolist() == [[True, False, False, False], [True, True, True, False]]
    # How large a layer's scores are in all says nothing.
    np.testing.assert_array_equal(across_layers(np.stack([peaked, 1000 * even]), 2), keep)
    assert across_layers(np.stack([peaked, even]), 2, fewest=2).sum(axis=1).tolist() == [2, 2]
    protected = np.zeros((2, 4), dtype=bool)
    protected[0, 3] = True
    assert across_layers(np.stack([peaked, even]).ravel(), 2, protected)[0].tolist() == [True, False, False, True]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 4), st.data())
def test_no_other_choice_captures_more(seed: int, n_layer: int, n_expert: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, n_expert))
    fewest = data.draw(st.integers(1, size))
    scores = np.random.default_rng(seed).gamma(0.5, size=(n_layer, n_expert)) + 1e-9
    keep = across_layers(scores, size, fewest=fewest)
    assert keep.sum() == size * n_layer and (keep.sum(axis=1) >= fewest).all()
    rows = [np.array(row) for row in product([False, True], repeat=n_expert) if sum(row) >= fewest]
    others = (np.stack(rows_) for rows_ in product(rows, repeat=n_layer))
    best = max(shares_of(scores, other) for other in others if other.sum() == size * n_layer)
    assert shares_of(scores, keep) == pytest.approx(best)


@pytest.mark.parametrize("strategy", PER_LAYER_STRATEGIES)
def test_strategies_hold_as_many_in_all(strategy: str) -> None:
    rng = np.random.default_rng(5)
    steepness = np.array([3, 1, 0.1])[:, None]
    saliency = np.exp(-steepness * np.arange(16)) * (1 + 0.1 * rng.random((30, 3, 16)))
    profile = profile_of(saliency, [0] * 15 + [1] * 15, 16)
    equal, free = (choose_experts(profile, [6, 4], strategy, fewest=fewest) for fewest in (None, 2))
    for a, b, size in zip(equal, free, (6, 4), strict=True):
        assert a.sum() == b.sum() == 3 * size and (b.sum(axis=1) >= 2).all()
        counts = b.sum(axis=1)
        assert counts[0] < counts[2], "few experts carry the first layer"
    if strategy == "ranked":
        assert captured(profile, free[0]) > captured(profile, equal[0])


def test_islands_still_finds_the_kinds_of_traffic() -> None:
    profile, kinds = two_kinds()
    found = choose_experts(profile, [9, 9], "islands", fewest=2)
    assert {keep.tobytes() for keep in found} == {kind.tobytes() for kind in kinds}
    covered = choose_experts(profile, [9, 9], "islands", fewest=2, cover=True)
    assert np.logical_or.reduce(covered).all()
    assert [keep.sum() for keep in covered] == [27, 27]
    assert (islands(profile, [9, 9]).keeps[0].sum(axis=1) == 9).all()


def test_what_cannot_be() -> None:
    profile, _ = two_kinds()
    for strategy in set(STRATEGY_NAMES) - set(PER_LAYER_STRATEGIES):
        with pytest.raises(MoeshardError, match=rf"'{strategy}' gives every layer .* islands, ranked, reap"):
            choose_experts(profile, [8], strategy, fewest=2)
    with pytest.raises(MoeshardError, match="among 2 groups of experts"):
        choose_experts(profile, [8], "ranked", expert_groups=2, fewest=2)


def test_a_node_is_made_smaller_until_it_fits() -> None:
    """Where the layer that gets more experts is one whose experts are larger."""
    cost = np.array([1, 3])

    def choose(sizes: object) -> list[np.ndarray]:
        assert isinstance(sizes, list)
        return [across_layers(np.stack([np.array([9.0] + [0.01] * 7), np.ones(8)]), size, fewest=1) for size in sizes]

    def memory(keep: np.ndarray) -> Memory:
        return Memory(int(keep.sum(axis=1) @ cost), 0, 0)

    # 4 in each layer would take 16.
    sizes, keeps, memories = fit([4, 4], [16, 100], 1, 4, choose, memory)
    assert sizes == [3, 4] and memories[0].total <= 16
    assert [keep.sum() for keep in keeps] == [6, 8]
    assert fit([4], None, 1, 4, choose, memory)[0] == [4]


def topics(seed: int) -> Profile:
    """Sequences about one of six topics each, in four domains."""
    rng = np.random.default_rng(seed)
    topic = rng.gamma(0.4, size=(6, 3, 24))
    saliency = topic[rng.integers(6, size=60)] * rng.gamma(2, 0.5, size=(60, 3, 24))
    return profile_of(saliency, [index // 15 for index in range(60)], 24)


def test_a_search_that_is_gone_on_with_is_as_good_as_a_new_one() -> None:
    anew, again, first = [], [], []
    for seed in range(12):
        profile, begun = topics(seed), Begun()
        first.append(islands(profile, [9, 9, 8], fewest=3, begun=begun).lost)
        again.append(islands(profile, [8, 8, 8], fewest=3, begun=begun).lost)
        anew.append(islands(profile, [8, 8, 8], fewest=3).lost)
    # One may end in a better place than the other; neither does so as a rule.
    assert sum(again) < 1.01 * sum(anew)
    assert sum(first) < sum(anew)


def test_nodes_that_were_made_smaller_are_as_good(tinymoe: Path, own_profile: Profile) -> None:
    budgets = [shard_memory(GGUFMap(tinymoe), 40, Use(n_ctx=512)).total] * 2
    plan = make_plan(
        tinymoe, own_profile, budgets=budgets, strategy="islands", use=Use(n_ctx=512), per_layer=True, restarts=4
    )
    assert all(node.facts["memory"]["total"] <= budget for node, budget in zip(plan.nodes, budgets, strict=True))
    sizes = plan.parameters["n_keep"]
    anew = islands(own_profile, sizes, fewest=8, restarts=4)
    parts = contributions(own_profile, order := np.argsort(own_profile.domain, kind="stable"))
    lost = np.stack([parts.lost(node.keep[own_profile.layers]) for node in plan.nodes], axis=1).min(axis=1)
    tokens = own_profile.n_tokens[order]
    domain = np.array([tokens[own_profile.domain[order] == index].sum() for index in own_profile.domain[order]])
    assert lost @ (tokens / domain) / len(own_profile.domains) <= 1.02 * anew.lost


@pytest.fixture(scope="module")
def own_profile(tinymoe: Path) -> Profile:
    return analyze(moeshard.Model(tinymoe, n_threads=1), embedded_traffic("calibration"), n_tokens=1024, window=128)


def test_memory_is_that_of_the_shard(tinymoe: Path, own_profile: Profile, tmp_path: Path) -> None:
    use = Use(n_ctx=512)
    plan = make_plan(tinymoe, own_profile, n_keep=[32, 48], strategy="islands", use=use, per_layer=True, restarts=2)
    for node, shard in zip(plan.nodes, moeshard.split(tinymoe, plan, tmp_path), strict=True):
        assert node.facts["experts"] == {"fewest": shard.n_expert_fewest, "most": shard.n_expert}
        assert shard.n_expert_fewest < shard.n_expert
        model = _core.Model(shard.paths[0], mmap=False)
        context = _core.Context(model, n_ctx=use.n_ctx, n_ubatch=use.n_ubatch, n_threads=1)
        said = node.facts["memory"]
        assert context.memory == (said["weights"], said["context"], said["compute"])
    budget = shard_memory(GGUFMap(tinymoe), 40, use).total
    plan = make_plan(tinymoe, own_profile, budgets=[budget], strategy="ranked", use=use, per_layer=True)
    assert 36 <= plan.parameters["n_keep"][0] <= 40
    assert plan.nodes[0].facts["memory"]["total"] <= budget


def test_command_line(cli: Cli, own_profile: Profile, tmp_path: Path) -> None:
    own_profile.save(tmp_path / "p.npz")
    base = ("plan", "tinymoe", "--profile", tmp_path / "p.npz", "--groups", 2, "--keep", 32)
    for strategy in PER_LAYER_STRATEGIES:
        out = tmp_path / f"{strategy}.json"
        own = ("--restarts", 2) if strategy == "islands" else ()
        done = cli(*base, "-o", out, "--strategy", strategy, "--per-layer", *own)
        assert done.code == 0, done.err
        plan = moeshard.read_plan(out)
        assert plan.is_per_layer
        for node in plan.nodes:
            held = node.facts["experts"]
            assert f"{held['fewest']}-{held['most']}" in done.out
            assert int(node.keep.sum()) == 5 * 32 and held["fewest"] >= 8
    done = cli("split", "tinymoe", "-o", tmp_path / "s", "--plan", tmp_path / "islands.json", "--json")
    assert [shard["n_expert"] > 32 for shard in json.loads(done.out)["shards"]] == [True, True]
    for shard in (tmp_path / "s").glob("*.gguf"):
        assert cli("verify", shard, "--source", "tinymoe").code == 0
    done = cli(*base, "-o", tmp_path / "no.json", "--strategy", "snake", "--per-layer")
    assert done.code != 0 and "choose from islands, ranked, reap" in " ".join(done.err.split())
