"""Placing sessions: answers that are known, against brute force, and on the embedded model's own domains."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli

import moeshard
from moeshard import GGUFMap, MoeshardError, Placement, Plan, PlanNode
from moeshard.evaluation.losses import measure_losses
from moeshard.gguf.identity import identify
from moeshard.placement.decision import MIN_TOKENS, place_by_both, place_by_loss, place_by_saliency
from moeshard.placement.probes import PROBES, by_saliency
from moeshard.planning.strategies import best
from moeshard.traffic.domains import Domain
from moeshard.traffic.embedded import embedded_domains, embedded_text
from moeshard.traffic.windows import text_windows

# Of a mean loss. Batches of another size round otherwise, quantised activations make steps of that, and a step may tip
# a near-tie of a router: then a token is sent to another expert, which costs or gains tenths of a nat.
ROUNDING = 0.03


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def everything(model: moeshard.Model) -> np.ndarray:
    return np.ones((model.n_layer, model.n_expert), dtype=bool)


@pytest.fixture(scope="module")
def prompts(model: moeshard.Model) -> dict[str, list[np.ndarray]]:
    """Of each domain, beginnings of held-out windows."""
    return {
        name: [window[:65] for window in text_windows(model.tokenize(embedded_text(name)), 128, 4)]
        for name in embedded_domains()[:3]
    }


@pytest.fixture(scope="module")
def island_plan(model: moeshard.Model, tinymoe: Path, prompts: dict[str, list[np.ndarray]]) -> Plan:
    """A node for each of these domains, with the best half for it."""
    from moeshard.profile.measure import analyze

    texts = [Domain(name, (embedded_text(name, "calibration"),)) for name in prompts]
    profile = analyze(model, texts, n_tokens=1024, window=128)
    keeps = []
    for name in prompts:
        keep = np.ones((model.n_layer, model.n_expert), dtype=bool)
        keep[profile.layers] = best(profile.total("saliency", [name]), model.n_expert // 2)
        keeps.append(PlanNode(name, keep))
    return Plan(keeps, "by domain", {}, replace(identify(GGUFMap(tinymoe)), facts={"path": "tinymoe"}))


def plan_of(model: moeshard.Model, *keeps: np.ndarray, used: int | None = None) -> Plan:
    nodes = [PlanNode(f"n{index}", keep, used) for index, keep in enumerate(keeps)]
    return Plan(nodes, "made up", {}, identify(GGUFMap(model.path)))


def brute_force_loss(model: moeshard.Model, tokens: np.ndarray, keep: np.ndarray | None) -> float:
    logits = model.logits(tokens[:-1], keep).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-logits[np.arange(len(tokens) - 1), tokens[1:]].mean())


def halves(model: moeshard.Model) -> list[np.ndarray]:
    half = model.n_expert // 2
    return [model.keep(f"0-{half - 1}"), model.keep(f"{half}-{model.n_expert - 1}")]


def test_who_holds_everything_wins_and_is_never_refused(
    model: moeshard.Model, everything: np.ndarray, prompts: dict[str, list[np.ndarray]]
) -> None:
    first, second = halves(model)
    placement = Placement(plan_of(model, first, everything, second), model, min_quality=1, min_captured=1)
    for own in prompts.values():
        for tokens in own:
            held = placement.place(tokens, "saliency")
            assert held.node == "n1" and held.index == 1
            assert held.scores["n1"] == pytest.approx(1)
            assert held.scores["n0"] + held.scores["n2"] == pytest.approx(1)
            # A smaller node may predict a few tokens better by chance; the whole is never worse than itself.
            lost = placement.place(tokens)
            assert lost.node is not None
            assert lost.scores["n1"] == pytest.approx(lost.full, rel=ROUNDING)


def test_who_holds_what_the_prompt_wants_wins(model: moeshard.Model, prompts: dict[str, list[np.ndarray]]) -> None:
    tokens = next(iter(prompts.values()))[0]
    trace = model.trace(tokens, norms=True)
    wanted = np.zeros((model.n_layer, model.n_expert))
    for row, layer in enumerate(trace.layers):
        np.add.at(wanted[layer], trace.ids[row].ravel(), (trace.weights[row] * trace.norms[row]).ravel())
    good = best(wanted, model.n_expert // 2)
    placed = Placement(plan_of(model, ~good, good), model).place(tokens, "saliency")
    assert placed.node == "n1" and placed.clear and placed.candidates == ["n1"]
    layers = model.moe_layers
    share = (wanted * good)[layers].sum(axis=1) / wanted[layers].sum(axis=1)
    assert placed.scores["n1"] == pytest.approx(share.mean())
    assert placed.margin == pytest.approx(2 * share.mean() - 1)
    assert placed.quality == placed.scores["n1"] > 0.5


def test_scores_are_those_of_brute_force(model: moeshard.Model, prompts: dict[str, list[np.ndarray]]) -> None:
    keeps = halves(model)
    placement = Placement(plan_of(model, *keeps), model)
    for own in prompts.values():
        placed = placement.place(own[0], "loss")
        assert placed.full == pytest.approx(brute_force_loss(model, own[0], None), rel=ROUNDING)
        for node, keep in zip(placement.plan.nodes, keeps, strict=True):
            assert placed.scores[node.name] == pytest.approx(brute_force_loss(model, own[0], keep), rel=ROUNDING)
        assert placed.quality == pytest.approx(math.exp(placed.full - min(placed.scores.values())))


def test_nodes_with_their_own_experts_per_token(model: moeshard.Model, everything: np.ndarray) -> None:
    tokens = model.tokenize(embedded_text(embedded_domains()[0])[:600])[:80]
    used = model.n_expert_used // 4  # so few that the losses are far apart, whatever is rounded on the way
    placed = Placement(plan_of(model, everything, used=used), model).place(tokens, "loss")
    fewer, full = (brute_force_loss(each, tokens, None) for each in (model.sibling(n_expert_used=used), model))
    assert abs(fewer - full) > 0.1 * full
    assert placed.scores["n0"] == pytest.approx(fewer, rel=ROUNDING)
    assert placed.full == pytest.approx(full, rel=ROUNDING)


def test_evaluation_places_alike(model: moeshard.Model, island_plan: Plan) -> None:
    n_prompt, texts = 32, [Domain(name, (embedded_text(name)[:3000],)) for name in embedded_domains()[:2]]
    losses = measure_losses(
        model, [node.keep for node in island_plan.nodes], texts, n_windows=2, window=64, n_prompt=n_prompt
    )
    placement = Placement(island_plan, model)
    row = 0
    for text in texts:
        windows = text_windows(model.tokenize(text.texts[0]), 64)
        for number in range(2):
            tokens = windows[number * len(windows) // 2]
            scores = placement.place(tokens[: n_prompt + 1], "loss").scores
            np.testing.assert_allclose(
                list(scores.values()), losses.groups[:, row, :n_prompt].mean(axis=1), rtol=ROUNDING
            )
            held = placement.place(tokens[:n_prompt], "saliency").scores
            np.testing.assert_allclose(list(held.values()), losses.captured[:, row], atol=ROUNDING)
            row += 1


@pytest.mark.parametrize("probe", PROBES)
def test_prompts_go_to_the_island_of_their_domain(
    model: moeshard.Model, island_plan: Plan, prompts: dict[str, list[np.ndarray]], probe: str
) -> None:
    placement = Placement(island_plan, model, min_quality=0, min_captured=0)
    home = [placed.node == name for name, own in prompts.items() for placed in placement.place_many(own, probe)]
    assert np.mean(home) > 0.7, "chance is a third"


def test_losses_by_hand() -> None:
    full = np.full(40, 1.0)
    spread = np.where(np.arange(40) % 2, 0.5, -0.5)
    losses = np.stack([full + 0.3 + spread, full + 0.1, full + 1.1 + spread])
    placed = place_by_loss(["a", "b", "c"], losses, full)
    assert (placed.node, placed.index, placed.best, placed.n_tokens) == ("b", 1, "b", 41)
    assert placed.scores == pytest.approx({"a": 1.3, "b": 1.1, "c": 2.1})
    assert placed.margin == pytest.approx(0.2)
    assert placed.error == pytest.approx(spread.std(ddof=1) / math.sqrt(40))
    assert placed.quality == pytest.approx(math.exp(-0.1))
    assert placed.clear and placed.candidates == ["b"] and "a is 0.200 ± 0.080 nats per token behind" in placed.reason
    # What makes a token hard for all nodes is no uncertainty of the margin between them.
    assert place_by_loss(["a", "b", "c"], losses + np.arange(40), full, min_quality=0).error == pytest.approx(
        placed.error
    )


def test_both_by_hand() -> None:
    rng = np.random.default_rng(0)
    full, wanted = rng.random(40), 1 + rng.random((3, 41))
    losses = full + np.array([[0.2], [0.5]]) + 0.1 * rng.random((2, 40))
    held = wanted * np.array([0.3, 0.6])[:, None, None]
    placed = place_by_both(["a", "b"], losses, full, wanted, held)
    by_loss = place_by_loss(["a", "b"], losses, full)
    assert by_loss.node == "a", "by loss alone it is the other one"
    fit = {
        name: np.exp(full.mean() - loss.mean()) * part
        for name, loss, part in zip("ab", losses, (0.3, 0.6), strict=True)
    }
    assert placed.scores == pytest.approx(fit) and placed.quality == pytest.approx(fit["b"]) and placed.full == 1
    assert placed.node == "b" and placed.margin == pytest.approx(math.log(fit["b"] / fit["a"]))
    assert placed.captured == pytest.approx({"a": 0.3, "b": 0.6})
    assert placed.excess == pytest.approx({n: v - full.mean() for n, v in by_loss.scores.items()})
    # All tokens want the same of the experts, so what is uncertain is the loss; the first token has none.
    assert by_loss.error is not None and placed.error == pytest.approx(by_loss.error, rel=0.02)
    assert "in the logarithm behind" in placed.reason
    assert place_by_both(["a", "b"], losses, full, wanted, held, min_fit=0.5).node is None
    with pytest.raises(MoeshardError, match="one token more"):
        place_by_both(["a", "b"], losses, full, wanted[:, :40], held[:, :, :40])
    with pytest.raises(MoeshardError, match="do not fit"):
        place_by_both(["a"], losses, full, wanted, held)


def test_too_close_to_call_by_hand() -> None:
    full = np.full(40, 1.0)
    spread = np.where(np.arange(40) % 2, 0.5, -0.5)
    losses = np.stack([full + 0.2 + spread, full + 0.1, full + 2, full + 0.1])
    placed = place_by_loss(["a", "b", "c", "d"], losses, full)
    assert placed.node == "b" and not placed.clear and placed.candidates == ["b", "d", "a"]
    assert "too close to call: d, a" in placed.reason
    # Who is not good enough is no candidate, however close.
    assert place_by_loss(["a", "b", "c", "d"], losses, full, min_quality=0.85).candidates == ["b", "d"]
    alone = place_by_loss(["a"], losses[:1], full)
    assert alone.node == "a" and alone.margin is None and alone.error is None and alone.clear


def test_refusals_by_hand() -> None:
    full = np.zeros(40)
    losses = np.stack([np.full(40, math.log(3)), np.full(40, math.log(4))])
    placed = place_by_loss(["a", "b"], losses, full)
    assert placed.node is None and placed.index is None and placed.candidates == []
    assert placed.best == "a" and placed.quality == pytest.approx(1 / 3)
    assert "no node is good enough" in placed.reason and "whole model" in placed.reason
    assert place_by_loss(["a", "b"], losses, full, min_quality=0.33).node == "a"
    assert place_by_loss(["a", "b"], losses + 2000, full, min_quality=0).node == "a"
    short = place_by_loss(["a", "b"], losses[:, :5], full[:5], min_quality=0)
    assert short.node is None and f"6 tokens, fewer than the {MIN_TOKENS}" in short.reason
    wanted, held = np.ones((2, 40)), np.stack([np.full((2, 40), 0.3), np.full((2, 40), 0.2)])
    assert place_by_saliency(["a", "b"], wanted, held).node is None
    assert place_by_saliency(["a", "b"], wanted, held, min_captured=0.3).node == "a"
    for bad in (losses[0], losses[:, :3], np.full_like(losses, np.nan)):
        with pytest.raises(MoeshardError, match=r"do not fit|finite"):
            place_by_loss(["a", "b"], bad, full)
    with pytest.raises(MoeshardError, match="do not fit"):
        place_by_saliency(["a"], wanted, held)


def test_error_of_a_captured_share_is_that_of_the_jackknife() -> None:
    rng = np.random.default_rng(3)
    wanted = rng.gamma(2, size=(3, 200))
    held = wanted * rng.beta(2, 3, size=(2, 3, 200))
    found = by_saliency(wanted, held)
    without = []
    for token in range(200):
        rest = np.arange(200) != token
        share = (held[:, :, rest].sum(axis=2) / wanted[:, rest].sum(axis=1)).mean(axis=1)
        without.append(share[1] - share[0])
    jackknife = np.sqrt(199 * np.var(without))
    assert found.errors(0)[1] == pytest.approx(jackknife, rel=0.02)
    assert found.errors(0)[0] == 0


def test_of_a_long_prompt_the_end_counts(model: moeshard.Model, island_plan: Plan) -> None:
    tokens = model.tokenize(embedded_text(embedded_domains()[0])[:2000])
    placement = Placement(island_plan, model, max_tokens=64)
    for probe in PROBES:
        placed = placement.place(tokens, probe)
        assert (placed.n_tokens, placed.n_cut) == (64, len(tokens) - 64)
        assert placed.scores == pytest.approx(placement.place(tokens[-64:], probe).scores)


def test_threads_place_at_once(model: moeshard.Model, island_plan: Plan, prompts: dict[str, list[np.ndarray]]) -> None:
    placement = Placement(island_plan, model)
    own = [tokens for part in prompts.values() for tokens in part]
    alone = [placed.scores for placed in placement.place_many(own)]
    with ThreadPoolExecutor(3) as pool:
        together = [placed.scores for placed in pool.map(placement.place, own)]
    assert together == alone


def test_bad_prompts_and_limits_are_named(model: moeshard.Model, island_plan: Plan) -> None:
    placement = Placement(island_plan, model)
    with pytest.raises(MoeshardError, match="the prompt is empty"):
        placement.place("")
    with pytest.raises(MoeshardError, match="one token"):
        placement.place([5])
    with pytest.raises(MoeshardError, match="choose both, loss or saliency"):
        placement.place("text", "luck")
    for probe in PROBES:
        with pytest.raises(MoeshardError):
            placement.place([model.n_vocab] * 20, probe)
        # And goes on as if nothing had happened.
        assert placement.place("a short text", probe).node is None
    for limits in ({"min_quality": 1.1}, {"min_captured": -0.1}, {"min_tokens": 1}, {"min_tokens": 9, "max_tokens": 8}):
        with pytest.raises(MoeshardError, match=next(iter(limits))):
            Placement(island_plan, model, **limits)  # type: ignore[arg-type]


def test_plans_of_other_models_are_refused(
    model: moeshard.Model, tinymoe: Path, island_plan: Plan, tmp_path: Path
) -> None:
    other = replace(island_plan, model=replace(island_plan.model, fingerprint="0" * 64))
    with pytest.raises(MoeshardError, match="was made for the model"):
        Placement(other, model)
    with pytest.raises(MoeshardError, match="load the whole model"):
        Placement(island_plan, moeshard.Model(tinymoe, keep=halves(model)[0], n_threads=1))
    with pytest.raises(MoeshardError, match="does not say where its model is"):
        Placement(replace(island_plan, model=replace(island_plan.model, facts={})))
    gone = replace(island_plan.model, facts={"path": str(tmp_path / "gone.gguf")})
    with pytest.raises(MoeshardError, match="gone.gguf"):
        Placement(replace(island_plan, model=gone))


def test_a_plan_finds_its_model_again(
    cli: Cli, tinymoe: Path, model: moeshard.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "copy.gguf").symlink_to(tinymoe)
    copy = tmp_path / "other.gguf"
    copy.write_bytes(tinymoe.read_bytes())
    profile = tmp_path / "p.npz"
    assert cli("analyze", "tinymoe", "-n", 256, "--threads", 1, "-o", profile).code == 0
    monkeypatch.chdir(tmp_path)
    for given, named in (("tinymoe", "tinymoe"), ("copy.gguf", "tinymoe"), ("other.gguf", str(copy))):
        options = ("--groups", 2, "--keep", model.n_expert // 2, "-o", "plan.json", "--force")
        assert cli("plan", given, "--profile", profile, *options).code == 0
        assert moeshard.read_plan("plan.json").model.facts["path"] == named
        monkeypatch.chdir("/")
        assert Placement(tmp_path / "plan.json", n_threads=1).names == ["node-0", "node-1"]
        monkeypatch.chdir(tmp_path)


def test_command_line(cli: Cli, island_plan: Plan, tmp_path: Path) -> None:
    plan, name = tmp_path / "plan.json", island_plan.nodes[0].name
    island_plan.write(plan)
    text = embedded_text(name)[:1200]
    base = ("place", "--plan", plan, "--threads", 1)
    done = cli(*base, "-p", text, "--min-quality", 0)
    assert done.code == 0 and f"{name} fits the prompt best" in done.out
    assert "captured" in done.out and "nats" in done.out
    lost = cli(*base, "-p", text, "--probe", "loss", "--min-quality", 0)
    assert lost.code == 0 and f"{name} predicts the prompt best" in lost.out and "captured" not in lost.out
    (tmp_path / "prompt.txt").write_text(text + "\n", encoding="utf-8")
    told = json.loads(cli(*base, "tinymoe", "-f", tmp_path / "prompt.txt", "--min-quality", 0, "--json").out)
    assert told["node"] == name and told["index"] == 0 and told["clear"] in (True, False)
    assert set(told["scores"]) == {node.name for node in island_plan.nodes}
    held = cli(*base, "-p", text, "--probe", "saliency", "--tokens", 64, "--min-captured", 0)
    assert held.code == 0 and "of its saliency" in held.out and "[64 tokens, the last of" in held.err
    refused = cli(*base, "-p", text, "--probe", "saliency", "--min-captured", 1)
    assert refused.code == 3 and "refused: no node is good enough" in refused.out
    refused = cli(*base, "-p", "few words", "--json")
    assert refused.code == 3 and json.loads(refused.out)["node"] is None
    for arguments, said in (
        (("-p", text, "--chat"), "chat template"),
        (("-p", ""), "the prompt is empty"),
        (("no/such.gguf", "-p", text), "no/such.gguf"),
    ):
        wrong = cli(*base, *arguments)
        assert wrong.code == 1 and said in wrong.err and wrong.out == ""
    assert "choose from both, loss, saliency" in cli(*base, "-p", text, "--probe", "luck").err
    for usage in (
        (),
        ("-p", text, "--probe", "luck"),
        ("-p", "a", "-f", "b"),
        ("-p", "a", "--system", "b"),
        ("-p", "a", "--min-quality", 2),
    ):
        assert cli(*base, *usage).code == 2
