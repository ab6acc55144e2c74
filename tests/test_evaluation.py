"""Losses of keeps, measured side by side, against one model and one text at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard import GGUFMap, MoeshardError, Plan, PlanNode
from moeshard.evaluation.losses import Losses, measure_losses
from moeshard.gguf.identity import identify
from moeshard.placement.nodes import masked_nodes, plan_nodes
from moeshard.traffic.domains import Domain
from moeshard.traffic.embedded import embedded_domains
from moeshard.traffic.windows import text_windows

WINDOW, PROMPT = 64, 16


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def domains() -> list[Domain]:
    return [Domain(name, (moeshard.embedded_text(name)[:4000],)) for name in embedded_domains()[:2]]


@pytest.fixture(scope="module")
def keeps(model: moeshard.Model) -> list[np.ndarray]:
    everything = np.ones((5, 128), dtype=bool)
    return [everything, model.keep("0-63"), model.keep("64-127")]


@pytest.fixture(scope="module")
def losses(model: moeshard.Model, keeps: list[np.ndarray], domains: list[Domain]) -> Losses:
    return measure_losses(model, keeps, domains, n_windows=3, window=WINDOW, n_prompt=PROMPT)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    peak = wide.max(axis=1, keepdims=True)
    return wide - peak - np.log(np.exp(wide - peak).sum(axis=1, keepdims=True))


def test_losses_are_those_of_each_keep_alone(
    model: moeshard.Model, keeps: list[np.ndarray], domains: list[Domain], losses: Losses
) -> None:
    row = 0
    for domain in domains:
        windows = text_windows(model.tokenize(domain.texts[0]), WINDOW)
        for number in range(3):
            tokens = windows[number * len(windows) // 3]
            position = np.arange(WINDOW)
            whole = log_softmax(model.logits(tokens[:-1]))
            # Batches of another size round otherwise, and quantised activations make steps of that.
            np.testing.assert_allclose(losses.full[row].mean(), -whole[position, tokens[1:]].mean(), rtol=0.01)
            for index, keep in enumerate(keeps):
                own = log_softmax(model.logits(tokens[:-1], keep))
                kl = (np.exp(whole) * (whole - own)).sum(axis=1)
                np.testing.assert_allclose(
                    losses.groups[index, row].mean(), -own[position, tokens[1:]].mean(), rtol=0.01
                )
                np.testing.assert_allclose(losses.kl[index, row].mean(), kl.mean(), rtol=0.03, atol=2e-3)
                same = (own.argmax(axis=1) == whole.argmax(axis=1)).mean()
                assert abs(losses.same[index, row].mean() - same) <= 4 / WINDOW
            row += 1
    assert row == len(losses.domain) == 6


def test_a_keep_of_everything_loses_nothing(losses: Losses) -> None:
    np.testing.assert_allclose(losses.groups[0], losses.full, atol=1e-5)
    assert np.abs(losses.kl[0]).max() < 1e-4 and losses.same[0].all()
    np.testing.assert_allclose(losses.captured[0], 1, rtol=1e-6)
    # The two halves share the rest between them.
    np.testing.assert_allclose(losses.captured[1] + losses.captured[2], 1, rtol=1e-6)
    assert losses.mean(losses.group_losses()[1]) > losses.mean(losses.full_loss()) + 0.05


def test_placement(losses: Losses) -> None:
    oracle = losses.placed_losses(losses.placement("oracle"))
    np.testing.assert_array_equal(oracle, losses.group_losses().min(axis=0))
    for probe in ("both", "loss", "saliency"):
        node = losses.placement(probe)
        assert (losses.placed_losses(node) >= oracle).all()
    assert (losses.placement("saliency") == 0).all(), "the node that holds everything captures most"
    with pytest.raises(MoeshardError, match="loss, saliency or oracle"):
        losses.placement("luck")


def test_means_count_domains_alike(losses: Losses) -> None:
    values = np.where(losses.domain == 0, 1.0, 3.0)
    assert losses.mean(values) == 2
    assert list(losses.by_domain(values).values()) == [1.0, 3.0]


def test_bad_windows_are_named(model: moeshard.Model, keeps: list[np.ndarray]) -> None:
    with pytest.raises(MoeshardError, match="too short"):
        measure_losses(model, keeps, [Domain("tiny", ("a few words",))])
    with pytest.raises(MoeshardError, match="leave some to predict"):
        measure_losses(model, keeps, [Domain("x", ("text " * 500,))], window=64, n_prompt=64)
    twice = [Domain("x", ("text " * 500,))] * 2
    with pytest.raises(MoeshardError, match="one name"):
        measure_losses(model, keeps, twice, window=64, n_prompt=16)
    with pytest.raises(MoeshardError, match="no text"):
        measure_losses(model, keeps, [])


def test_memory_is_bounded_by_pieces_of_a_window(
    model: moeshard.Model,
    keeps: list[np.ndarray],
    domains: list[Domain],
    losses: Losses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So many that pieces of 20 tokens fit, the last one being shorter.
    monkeypatch.setattr("moeshard.runtime.logits.LOGIT_BYTES", 20 * (2 + len(keeps)) * model.n_vocab * 4)
    pieces = measure_losses(model, keeps, domains, n_windows=3, window=WINDOW, n_prompt=PROMPT)
    np.testing.assert_allclose(pieces.full.mean(axis=1), losses.full.mean(axis=1), rtol=0.01)
    np.testing.assert_allclose(pieces.groups.mean(axis=2), losses.groups.mean(axis=2), rtol=0.01)
    np.testing.assert_allclose(pieces.kl.mean(axis=2), losses.kl.mean(axis=2), rtol=0.05, atol=2e-3)


def test_nodes_use_their_own_number_of_experts(
    tinymoe: Path, model: moeshard.Model, keeps: list[np.ndarray], domains: list[Domain]
) -> None:
    used = model.n_expert_used
    nodes = masked_nodes(model, keeps, [None, used, used + 4])
    assert nodes[0].model is model and nodes[1].model is model
    assert nodes[2].model.n_expert_used == used + 4
    found = measure_losses(model, keeps, domains, nodes=nodes, n_windows=2, window=WINDOW, n_prompt=PROMPT)
    other = moeshard.Model(tinymoe, n_threads=1, n_expert_used=used + 4)
    tokens = text_windows(model.tokenize(domains[0].texts[0]), WINDOW)[0]
    position = np.arange(WINDOW)
    own, whole = log_softmax(other.logits(tokens[:-1], keeps[2])), log_softmax(model.logits(tokens[:-1]))
    np.testing.assert_allclose(found.groups[2, 0].mean(), -own[position, tokens[1:]].mean(), rtol=0.01)
    np.testing.assert_allclose(found.full[0].mean(), -whole[position, tokens[1:]].mean(), rtol=0.01)
    kl = (np.exp(whole) * (whole - own)).sum(axis=1)
    np.testing.assert_allclose(found.kl[2, 0].mean(), kl.mean(), rtol=0.05)
    # It matters: this is not what the keep gives with the model's own number.
    plain = log_softmax(model.logits(tokens[:-1], keeps[2]))
    assert np.abs(plain - own).max() > 0.1


@pytest.fixture(scope="module")
def plan(tinymoe: Path, model: moeshard.Model, keeps: list[np.ndarray]) -> Plan:
    nodes = [PlanNode("a", keeps[1]), PlanNode("b", keeps[2], model.n_expert_used + 4)]
    return Plan(nodes, "custom", {}, identify(GGUFMap(tinymoe)))


@pytest.mark.parametrize("options", [{}, {"trunk_once": True}, {"max_file_size": 4 << 20}])
def test_shards_lose_what_masks_lose(
    tinymoe: Path, model: moeshard.Model, plan: Plan, domains: list[Domain], tmp_path: Path, options: dict[str, int]
) -> None:
    moeshard.split(tinymoe, plan, tmp_path, **options)  # type: ignore[arg-type]
    keeps = [node.keep for node in plan.nodes]
    masks, shards = (
        measure_losses(model, keeps, domains, nodes=nodes, n_windows=2, window=WINDOW, n_prompt=PROMPT)
        for nodes in (plan_nodes(model, plan), plan_nodes(model, plan, tmp_path))
    )
    np.testing.assert_allclose(shards.groups.mean(axis=2), masks.groups.mean(axis=2), rtol=0.01)
    np.testing.assert_allclose(shards.kl.mean(axis=2), masks.kl.mean(axis=2), rtol=0.05, atol=2e-3)
    np.testing.assert_array_equal(shards.captured, masks.captured)
    assert masks.groups[0].mean() != masks.groups[1].mean()


def test_a_shard_that_is_not_the_plans_is_named(
    tinymoe: Path, model: moeshard.Model, plan: Plan, keeps: list[np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(MoeshardError, match="folder of shards"):
        plan_nodes(model, plan, tmp_path / "nowhere")
    with pytest.raises(MoeshardError, match=r"no shard of node 'a': \S+\.a\.gguf is missing.*moeshard split"):
        plan_nodes(model, plan, tmp_path)
    first, second = plan.nodes
    for nodes, said in (
        ([PlanNode("a", keeps[2]), second], "holds other experts than the plan says of node 'a'"),
        ([first, PlanNode("b", keeps[2])], rf"uses {model.n_expert_used} experts per token, but node 'b'"),
    ):
        moeshard.split(tinymoe, Plan(nodes, "custom", {}, plan.model), tmp_path, force=True)
        with pytest.raises(MoeshardError, match=said):
            plan_nodes(model, plan, tmp_path)
    (tmp_path / f"{tinymoe.stem}.a.gguf").write_bytes(tinymoe.read_bytes())
    with pytest.raises(MoeshardError, match="is no shard"):
        plan_nodes(model, plan, tmp_path)
    part = moeshard.Model(tinymoe, keep=keeps[1], n_threads=1)
    with pytest.raises(MoeshardError, match="load the whole model"):
        plan_nodes(part, plan)
