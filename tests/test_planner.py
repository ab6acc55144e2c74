"""Strategies, islands and plans: on profiles whose best answer is known, and on the embedded model's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moeshard
from moeshard import GGUFMap, MoeshardError, _core
from moeshard.gguf.identity import ModelIdentity
from moeshard.planning.budget import Use, shard_memory
from moeshard.planning.cosaliency import contributions
from moeshard.planning.islands import islands
from moeshard.planning.planner import STRATEGY_NAMES, choose_experts, make_plan
from moeshard.planning.strategies import best
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile
from moeshard.profile.statistics import captured, super_experts
from moeshard.traffic.domains import Domain, embedded_traffic


def profile_of(saliency: np.ndarray, domain: list[int], n_expert: int) -> Profile:
    """A profile of sequences of one token with this saliency (S, M, E), everything else following from it."""
    s, m, e = saliency.shape
    count = np.rint(saliency * 10).astype(np.int32)
    d = max(domain) + 1
    together = np.einsum("sma,smb->mab", saliency, saliency)
    own = np.equal.outer(np.arange(d), domain)
    return Profile(
        model=ModelIdentity("made up", "qwen3moe", "0" * 64, m, n_expert, list(range(m))),
        domains=[f"domain-{i}" for i in range(d)],
        layers=np.arange(m, dtype=np.int32),
        domain=np.array(domain, dtype=np.int32),
        n_tokens=np.full(s, 100, dtype=np.int32),
        count=count,
        mass=saliency.astype(np.float32),
        saliency=saliency.astype(np.float32),
        energy=(saliency**2).astype(np.float32),
        entropy=np.ones((s, m), dtype=np.float32),
        peak=np.ones((d, m, e), dtype=np.float32),
        together=np.repeat(np.rint(together)[None], d, axis=0).astype(np.int32),
        cosaliency=np.einsum("ds,sma,smb->dmab", own, saliency, saliency).astype(np.float32),
    )


def two_kinds(seed: int = 0, n_layer: int = 3, n_expert: int = 16) -> tuple[Profile, np.ndarray]:
    """Sequences of two kinds: each uses half of the experts, and some that both need. And these halves, (2, M, E)."""
    rng = np.random.default_rng(seed)
    halves = np.zeros((2, n_layer, n_expert), dtype=bool)
    shared = np.zeros((n_layer, n_expert), dtype=bool)
    for layer in range(n_layer):
        order = rng.permutation(n_expert)
        shared[layer, order[:2]] = True
        halves[0, layer, order[2:9]] = True
        halves[1, layer, order[9:]] = True
    kinds = rng.permutation([0, 1] * 20)
    saliency = 0.1 * rng.random((40, n_layer, n_expert)) + 3 * shared
    for sequence, kind in zip(saliency, kinds, strict=True):
        sequence += halves[kind] * (1 + rng.random((n_layer, n_expert)))
    # Domains say nothing about the kinds.
    return profile_of(saliency, rng.permutation([0, 1] * 20).tolist(), n_expert), halves | shared


def test_islands_finds_the_kinds_of_traffic() -> None:
    profile, kinds = two_kinds()
    found = islands(profile, [9, 9])
    assert {keep.tobytes() for keep in found.keeps} == {kind.tobytes() for kind in kinds}
    assert np.bincount(found.owner).tolist() == [20, 20]
    assert found.lost < 0.01
    # One node for all can hold only half as much of what is not shared.
    alone = islands(profile, [9])
    assert alone.lost > 0.04


def test_islands_is_deterministic_and_restarts_help() -> None:
    rng = np.random.default_rng(4)
    profile = profile_of(rng.gamma(0.5, size=(60, 4, 32)), [0] * 60, 32)
    first, again = islands(profile, [8] * 4, restarts=4), islands(profile, [8] * 4, restarts=4)
    for a, b in zip(first.keeps, again.keeps, strict=True):
        np.testing.assert_array_equal(a, b)
    assert islands(profile, [8] * 4, restarts=32).lost <= first.lost
    other = islands(profile, [8] * 4, restarts=1, seed=5)
    assert any((a != b).any() for a, b in zip(first.keeps, other.keeps, strict=True))


def test_islands_covers_every_expert_where_asked() -> None:
    profile, _ = two_kinds(n_expert=16)
    plain, covered = islands(profile, [9, 9]), islands(profile, [9, 9], cover=True)
    assert np.logical_or.reduce(covered.keeps).all()
    assert not np.logical_or.reduce(islands(profile, [5, 5]).keeps).all()
    assert covered.lost < plain.lost + 0.01
    for keep in covered.keeps:
        assert (keep.sum(axis=1) == 9).all()


def test_super_experts_are_on_every_island() -> None:
    profile, _ = two_kinds()
    profile.peak[:] = 1
    profile.peak[1, 2, 7] = 30
    for values in (
        profile.saliency[:, 2, 7],
        profile.energy[:, 2, 7],
        profile.cosaliency[:, 2, 7],
        profile.cosaliency[:, 2, :, 7],
    ):
        values[:] = 0
    assert np.argwhere(super_experts(profile)).tolist() == [[2, 7]]
    assert all(keep[2, 7] for keep in islands(profile, [9, 9]).keeps)
    assert not all(keep[2, 7] for keep in choose_experts(profile, [9, 9], "ranked"))


def test_more_super_experts_than_places_go_by_their_scores() -> None:
    scores = np.array([[5.0, 1, 2, 9, 4, 3]])
    protected = np.array([[True, True, True, False, True, False]])
    assert np.flatnonzero(best(scores, 2, protected)).tolist() == [0, 4]
    assert np.flatnonzero(best(scores, 5, protected)).tolist() == [0, 1, 2, 3, 4]


def test_islands_of_monotonous_traffic_are_no_worse_than_the_ranking(tinymoe: Path) -> None:
    """Experts that no token chose made all others super experts, and those of lowest ids were kept."""
    model = moeshard.Model(tinymoe, n_threads=1)
    profile = analyze(model, [Domain("a", ("aaaaaaaaaaaaaaaa " * 60,))])
    assert (profile.count.sum(axis=0) == 0).mean() > 0.5
    for size in (8, 16):
        island, ranked = (choose_experts(profile, [size], name)[0] for name in ("islands", "ranked"))
        assert captured(profile, island) > captured(profile, ranked) - 0.03
        parts = contributions(profile, np.flatnonzero(profile.n_tokens))
        lost = [parts.lost(keep[profile.layers]).mean() for keep in (island, ranked)]
        assert lost[0] <= lost[1] + 1e-6


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(STRATEGY_NAMES),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([1, 2]),
    st.integers(0, 10),
)
@example("coactivation", [6, 6], 2, 0)
@example("balanced", [5, 5, 5], 1, 0)
def test_every_strategy_fills_every_node(strategy: str, sizes: list[int], groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    profile = profile_of(rng.gamma(0.5, size=(12, 2, 12)), [0, 1, 2] * 4, 12)
    sizes = [size * groups for size in sizes]
    keeps = choose_experts(profile, sizes, strategy, expert_groups=groups)
    again = choose_experts(profile, sizes, strategy, expert_groups=groups)
    for keep, other, size in zip(keeps, again, sizes, strict=True):
        per_group = keep.reshape(2 * groups, -1).sum(axis=1)
        assert (per_group == size // groups).all()
        np.testing.assert_array_equal(keep, other)
    if strategy in ("snake", "balanced", "coactivation") and sum(sizes) >= 12 and len(set(sizes)) == 1:
        assert np.logical_or.reduce(keeps).all()


def test_strategies_by_hand() -> None:
    scores = np.array([[8, 7, 6, 5, 4, 3, 2, 1]], dtype=float)
    profile = profile_of(scores[None], [0], 8)

    def nodes(strategy: str, sizes: list[int], **options: float) -> list[list[int]]:
        return [np.flatnonzero(keep[0]).tolist() for keep in choose_experts(profile, sizes, strategy, **options)]

    assert nodes("ranked", [3, 2]) == [[0, 1, 2], [0, 1]]
    assert nodes("snake", [4, 4]) == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert nodes("snake", [2, 2]) == [[0, 3], [1, 2]]
    assert nodes("snake", [5, 5]) == [[0, 1, 2, 5, 6], [0, 1, 3, 4, 7]]
    assert nodes("balanced", [4, 4]) == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert nodes("shared-core", [4, 4], core=0.5) == [[0, 1, 2, 5], [0, 1, 3, 4]]
    assert nodes("contiguous", [4, 4]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert nodes("contiguous", [5, 5]) == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]
    # Chosen often for little: high saliency, low mean.
    profile.count[:] = [[[100, 1, 1, 1, 1, 1, 1, 1]]]
    assert nodes("reap", [3]) == [[1, 2, 3]]
    for wrong in ([9], [0]):
        with pytest.raises(MoeshardError, match="cannot hold"):
            nodes("ranked", wrong)
    with pytest.raises(MoeshardError, match="islands, contiguous"):
        nodes("best", [4])


@pytest.mark.parametrize(
    ("strategy", "options", "said"),
    [
        ("ranked", {"core": 0.5}, "'core' is of strategy shared-core; 'ranked' takes no options"),
        ("ranked", {"cover": True}, "'cover' is of strategy islands"),
        ("shared-core", {"seed": 1}, "'seed' is of strategy islands; 'shared-core' takes core"),
        (
            "islands",
            {"core": 0.5},
            "'core' is of strategy shared-core; 'islands' takes restarts, shrinkage, cover, seed",
        ),
        ("islands", {"luck": 1}, "there is no option 'luck'"),
        # These two never ended, and gave a node more experts than it has room for.
        ("shared-core", {"core": 1.5}, "'core': must be a number from 0 to 1, got 1.5"),
        ("shared-core", {"core": -0.5}, "'core': must be a number from 0 to 1, got -0.5"),
        ("shared-core", {"core": float("nan")}, "'core': must be a number"),
        ("islands", {"restarts": 0}, "'restarts': must be a whole number of at least 1, got 0"),
        ("islands", {"restarts": 1.5}, "'restarts': must be a whole number"),
        ("islands", {"shrinkage": 1.1}, "'shrinkage': must be a number from 0 to 1"),
        ("islands", {"seed": -1}, "'seed': must be a whole number"),
        ("islands", {"cover": 1}, "'cover': must be true or false"),
        ("islands", {"cover": True}, "'cover': 2 nodes have room for 10 experts per layer together, fewer than the 16"),
    ],
)
def test_options_are_the_strategys_own(strategy: str, options: dict[str, object], said: str) -> None:
    profile, _ = two_kinds()
    with pytest.raises(MoeshardError, match=f"option {said}|{said}"):
        choose_experts(profile, [5, 5], strategy, **options)


@pytest.mark.parametrize("core", [0, 0.25, 1])
def test_a_core_is_as_large_as_asked(core: float) -> None:
    profile, _ = two_kinds()
    keeps = choose_experts(profile, [8, 8], "shared-core", core=core)
    assert all((keep.sum(axis=1) == 8).all() for keep in keeps)
    assert ((keeps[0] & keeps[1]).sum(axis=1) == round(8 * core)).all()


def test_what_cannot_be_covered_is_told() -> None:
    profile, _ = two_kinds()
    # Super experts are on both nodes, and leave too few places for all others.
    profile.peak[:, :, :3] = 30
    with pytest.raises(MoeshardError, match="not every expert found a place"):
        choose_experts(profile, [8, 8], "islands", cover=True)
    assert np.logical_or.reduce(choose_experts(profile, [10, 10], "islands", cover=True)).all()


def test_coactivation_keeps_together_what_is_used_together() -> None:
    rng = np.random.default_rng(2)
    profile = profile_of(rng.random((8, 1, 8)), [0] * 8, 8)
    teams = [[0, 3, 5, 6], [1, 2, 4, 7]]
    profile.together[:] = 1
    for team in teams:
        profile.together[0, 0][np.ix_(team, team)] = 100
    keeps = choose_experts(profile, [4, 4], "coactivation")
    assert sorted(np.flatnonzero(keep[0]).tolist() for keep in keeps) == teams


@pytest.fixture(scope="module")
def own_profile(tinymoe: Path) -> Profile:
    return analyze(moeshard.Model(tinymoe, n_threads=1), embedded_traffic("calibration"), n_tokens=2048, window=128)


def test_memory_is_what_llama_cpp_allocates(tinymoe: Path, tmp_path: Path) -> None:
    source = GGUFMap(tinymoe)
    use = Use(n_ctx=1024, n_seq=2)
    said = shard_memory(source, 32, use)
    (shard,) = moeshard.split(tinymoe, "5-36", tmp_path / "x.gguf")
    model = _core.Model(shard.paths[0], mmap=False)
    context = _core.Context(model, n_ctx=use.n_ctx, n_seq_max=use.n_seq, n_ubatch=use.n_ubatch, n_threads=1)
    assert context.memory == (said.weights, said.context, said.compute)
    assert shard_memory(source, 64, use).weights > said.weights
    assert shard_memory(source, 32, replace(use, n_ctx=2048)).context == 2 * said.context


def test_budgets_are_filled_and_not_exceeded(tinymoe: Path, own_profile: Profile) -> None:
    source = GGUFMap(tinymoe)
    use = Use(n_ctx=512)
    exact = shard_memory(source, 40, use).total
    budgets = [exact, exact - 1, shard_memory(source, 128, use).total + 1]
    plan = make_plan(source, own_profile, budgets=budgets, use=use)
    assert plan.parameters["n_keep"] == [40, 39, 128]
    for node, budget in zip(plan.nodes, budgets, strict=True):
        assert node.facts["memory"]["total"] <= budget
    with pytest.raises(MoeshardError, match="too few for any shard: with 8 experts"):
        make_plan(source, own_profile, budgets=[1 << 20], use=use)
    with pytest.raises(MoeshardError, match="a token uses 8"):
        make_plan(source, own_profile, n_keep=[7])
    with pytest.raises(MoeshardError, match="either the number"):
        make_plan(source, own_profile)


def test_a_plan_says_what_it_captures(tinymoe: Path, own_profile: Profile, tmp_path: Path) -> None:
    plan = make_plan(tinymoe, own_profile, n_keep=[32] * 4)
    assert plan.parameters["texts"] == own_profile.facts["texts"]
    for node in plan.nodes:
        for name, share in node.facts["captured"].items():
            assert share == pytest.approx(captured(own_profile, node.keep, [name]), abs=1e-4)
    best_of = {name: max(node.facts["captured"][name] for node in plan.nodes) for name in own_profile.domains}
    top = best(own_profile.total("saliency"), 32)
    for name, share in best_of.items():
        assert share > captured(own_profile, top, [name]) - 0.02
    plan.write(tmp_path / "plan.json")
    written = moeshard.split(tinymoe, moeshard.read_plan(tmp_path / "plan.json"), tmp_path / "out")
    assert [shard.n_expert for shard in written] == [32] * 4
    other = replace(own_profile.model, fingerprint="1" * 64)
    with pytest.raises(MoeshardError, match="analyze this model"):
        make_plan(tinymoe, Profile(**{**vars(own_profile), "model": other}), n_keep=[32])


def test_command_line(cli: Cli, own_profile: Profile, tmp_path: Path) -> None:
    own_profile.save(tmp_path / "p.npz")
    base = ("plan", "tinymoe", "--profile", tmp_path / "p.npz")
    done = cli(*base, "-o", tmp_path / "plan.json", "--groups", 4, "--keep", 32)
    assert done.code == 0 and "32 of 128" in done.out and "node-3" in done.out
    assert "--force" in cli(*base, "-o", tmp_path / "plan.json", "--groups", 4, "--keep", 32).err
    for strategy in STRATEGY_NAMES:
        out = tmp_path / f"{strategy}.json"
        facts = json.loads(cli(*base, "-o", out, "--groups", 2, "--keep", 64, "--strategy", strategy, "--json").out)
        assert facts["strategy"] == strategy and len(facts["nodes"]) == 2
        assert cli("split", "tinymoe", "-o", tmp_path / "x", "--plan", out, "--dry-run").code == 0
    few = ("--groups", 2, "--keep", 64, "--restarts", 3)
    assert cli(*base, "-o", tmp_path / "few.json", *few).code == 0
    made = moeshard.read_plan(tmp_path / "few.json")
    done = cli(*base, "-o", tmp_path / "n.json", "--nodes", "16MiB,24MiB", "--ctx", 512, "--json")
    sizes = [node["n_expert"] for node in json.loads(done.out)["nodes"]]
    assert 8 <= sizes[0] < sizes[1] <= 128
    for options, message in (
        (("--groups", 4), "--keep"),
        (("--groups", 4, "--keep", 32, "--nodes", "1GiB"), "--nodes"),
        (("--nodes", "1MiB"), "too few"),
        (("--nodes", "lots"), "not a size"),
        (("--groups", 4, "--keep", 32, "--strategy", "luck"), "'luck' is unknown; choose from"),
        (("--groups", 4, "--keep", 32, "--core", 0.3), "'core' is of strategy shared-core"),
        (("--groups", 4, "--keep", 32, "--strategy", "shared-core", "--core", 1.5), "'core': must be a number from 0"),
        (("--groups", 4, "--keep", 32, "--strategy", "ranked", "--cover"), "'cover' is of strategy islands"),
        (("--groups", 4, "--keep", 32, "--strategy", "ranked", "--seed", 0), "'seed' is of strategy islands"),
        (("--groups", 2, "--keep", 32, "--cover"), "room for 64 experts per layer together, fewer than the 128"),
    ):
        done = cli(*base, "-o", tmp_path / "no.json", *options)
        assert done.code != 0 and message in " ".join(done.err.split())
    assert cli(*base, "-o", tmp_path / "no.json", *options[:4], "--strategy", "ranked", "--cover").code == 2
    assert made.parameters["restarts"] == 3 and made.parameters["cover"] is False
    assert not (tmp_path / "no.json").exists()
