"""`moeshard evaluate` and the file it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli

import moeshard
from moeshard import GGUFMap, MoeshardError, Plan, PlanNode, read_evaluation
from moeshard.evaluation.losses import measure_losses
from moeshard.gguf.identity import identify
from moeshard.placement.probes import PROBES
from moeshard.traffic.embedded import embedded_domains, embedded_text

QUICK = ("--windows", "4", "--window", "64", "--prompt", "16", "--threads", "1")
SCORES = {"nll", "nll_ci", "perplexity", "excess", "excess_ci", "ratio", "ratio_ci", "kl", "kl_ci", "kl_p99"}
SCORES |= {"top1", "top1_ci"}
NAMES = embedded_domains()[:2]


@pytest.fixture(scope="module")
def plan(tinymoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two halves of the experts, the second with more of them per token."""
    identity = identify(GGUFMap(tinymoe))
    keeps = np.zeros((2, identity.n_layer, identity.n_expert), dtype=bool)
    keeps[0, :, : identity.n_expert // 2] = True
    keeps[1] = ~keeps[0]
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    Plan([PlanNode("a", keeps[0]), PlanNode("b", keeps[1], 12)], "halves", {"n": 2}, identity).write(path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    folder = tmp_path_factory.mktemp("texts")
    arguments: list[str | Path] = []
    for name in NAMES:
        (folder / f"{name}.txt").write_text(embedded_text(name)[:4000], encoding="utf-8")
        arguments += ["--text", f"{name}={folder / name}.txt"]
    return arguments


@pytest.fixture
def run(cli: Cli, plan: Path, texts: list[str | Path]) -> Callable[..., Any]:
    return lambda *more: cli("evaluate", "tinymoe", "--plan", plan, *texts, *QUICK, *more)


@pytest.fixture(scope="module")
def saved(tinymoe: Path, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation with everything in it, answers too."""
    path = tmp_path_factory.mktemp("saved") / "eval.json"
    moeshard.evaluate(
        moeshard.Model(tinymoe, n_threads=1),
        plan,
        [moeshard.Domain(name, (embedded_text(name)[:4000],)) for name in NAMES],
        n_windows=4,
        window=64,
        n_prompt=16,
        n_answers=2,
        n_tokens=24,
    ).save(path)
    return path


def test_json_has_what_it_should(run: Callable[..., Any], tinymoe: Path, plan: Path) -> None:
    result = run("--generate", "0", "--json", "--probe", "saliency")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["moeshard_evaluation"] == 2 and found["domains"] == NAMES and found["generation"] is None
    assert "warning" not in result.err and found["settings"]["seen"] == []
    assert found["settings"]["windows"] == dict.fromkeys(NAMES, 4) and found["settings"]["prompt"] == 16
    model = moeshard.Model(tinymoe, n_threads=1)
    assert found["settings"]["n_expert_used"] == {"full": model.n_expert_used, "nodes": [model.n_expert_used, 12]}
    assert found["plan"] == {"file": str(plan), "strategy": "halves", "parameters": {"n": 2}}
    ways = [*found["groups"], found["hashed"], found["placed"], found["oracle"]]
    for scores in ways:
        assert set(scores) >= SCORES and list(scores["domains"]) == NAMES
        assert scores["nll"] == pytest.approx(np.mean([own["nll"] for own in scores["domains"].values()]))
        assert scores["excess"] == pytest.approx(scores["nll"] - found["full"]["nll"])
    assert found["hashed"]["nll"] == pytest.approx(np.mean([group["nll"] for group in found["groups"]]))
    assert found["oracle"]["nll"] <= min(found["placed"]["nll"], *(group["nll"] for group in found["groups"]))
    assert found["placed"]["probe"] == "saliency" and sum(found["placed"]["share"].values()) == pytest.approx(1)
    assert found["placed"]["regret"] == pytest.approx(found["placed"]["nll"] - found["oracle"]["nll"])
    assert found["placed"]["nll"] == pytest.approx(found["probes"]["saliency"]["nll"])
    assert set(found["probes"]) == set(PROBES)


def test_text_that_the_plan_was_made_from_is_told(
    cli: Cli, plan: Path, texts: list[str | Path], tmp_path: Path
) -> None:
    made = moeshard.read_plan(plan)
    seen = moeshard.Domain("other name", (embedded_text(NAMES[0])[:4000],))
    made.parameters["texts"] = {"mail": seen.digest}
    made.write(tmp_path / "plan.json")
    result = cli("evaluate", "tinymoe", "--plan", tmp_path / "plan.json", *texts, *QUICK, "--generate", "0", "--json")
    assert result.err.count("warning") == 2 and f"by text '{NAMES[0]}' too" in result.err
    assert f"experts were not chosen for {NAMES[1]}:" in result.err
    found = json.loads(result.out)
    assert found["settings"]["seen"] == [NAMES[0]]
    assert found["plan"]["file"] == str(tmp_path / "plan.json")


def test_figures_are_those_of_the_losses(tinymoe: Path, plan: Path, saved: Path) -> None:
    model = moeshard.Model(tinymoe, n_threads=1)
    keeps = [node.keep for node in moeshard.read_plan(plan).nodes]
    domains = [moeshard.Domain(name, (embedded_text(name)[:4000],)) for name in NAMES]
    losses = measure_losses(model, keeps, domains, n_windows=4, window=64, n_prompt=16)
    found = read_evaluation(saved)
    assert found.full.nll == pytest.approx(losses.mean(losses.full_loss()), rel=0.01)
    assert found.groups[0].scores.nll == pytest.approx(losses.mean(losses.group_losses()[0]), rel=0.01)
    assert found.groups[0].captured + found.groups[1].captured == pytest.approx(1)


def test_what_is_written_is_read_again(saved: Path) -> None:
    found = read_evaluation(saved)
    assert json.loads(json.dumps(found.to_json())) == json.loads(saved.read_text())
    assert found.loops is not None and found.loops.n == 2 and found.loops.tokens == 24
    assert set(found.loops.groups) == {"a", "b"} == {group.name for group in found.groups} == set(found.share)
    with pytest.raises(MoeshardError, match="--force"):
        found.save(saved)


def test_tables(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    result = run("--generate", "1", "--tokens", "8", "-o", out)
    assert result.code == 0, result.err
    found = read_evaluation(out)
    lines = {line.split()[0]: line.split() for line in reversed(result.out.splitlines()) if line.strip()}
    for name, scores in (("a", found.groups[0].scores), ("placed", found.placed), ("oracle", found.oracle)):
        assert f"{scores.perplexity:.2f}" == lines[name][1] and f"{scores.ratio:.3f}" == lines[name][2]
        assert scores.agreement is not None and f"{scores.agreement.top1:.1%}" == lines[name][-1]
    for name in NAMES:
        assert f"{found.full.domains[name].perplexity:.1f}" == lines[name][1]
    assert "Placed by both (this one counts)" in result.out and "degenerate loops" in result.out
    sentences = ("Placed by", "A loop", "With each tenth")
    assert all(len(line) <= 80 for line in result.out.splitlines() if not line.startswith(sentences))


def test_a_node_that_holds_everything_loses_nothing(tinymoe: Path, cli: Cli, tmp_path: Path, texts: list[str]) -> None:
    identity = identify(GGUFMap(tinymoe))
    everything = np.ones((identity.n_layer, identity.n_expert), dtype=bool)
    path = tmp_path / "plan.json"
    Plan([PlanNode("all", everything)], "everything", {}, identity).write(path)
    result = cli("evaluate", tinymoe, "--plan", path, *texts, *QUICK, "--generate", "0", "--json", "--min-quality", "1")
    found = json.loads(result.out)
    for key in ("hashed", "placed", "oracle"):
        assert found[key]["ratio"] == pytest.approx(1, abs=1e-6) and found[key]["top1"] == pytest.approx(1)
        assert found[key]["excess"] == pytest.approx(0, abs=1e-6) and found[key]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["placed"]["right"] == 1 and found["placed"]["regret"] == 0


def test_quality_becomes_an_exit_code(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    result = run("--generate", "0", "--json", "--min-quality", "0.99", "-o", out)
    found = json.loads(result.out)
    assert result.code == 1 and found["placed"]["ratio"] > 1 / 0.99
    assert json.loads(result.err.splitlines()[-1])["error"] == (
        f"placed.ratio: placed by both, perplexity is {found['placed']['ratio']:.3f} times the whole model's, a "
        f"quality of {np.exp(-found['placed']['excess']):.3f}, below the 0.99 of --min-quality"
    )
    assert read_evaluation(out).placed.nll == found["placed"]["nll"]
    enough = str(np.exp(-found["placed"]["excess"]) - 1e-6)
    assert run("--generate", "0", "--json", "--min-quality", enough).code == 0


def test_shards(tinymoe: Path, plan: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    moeshard.split(tinymoe, moeshard.read_plan(plan), tmp_path)
    options = ("--generate", "2", "--tokens", "12", "--json")
    masks = json.loads(run(*options).out)
    shards = json.loads(run(*options, "--shards", tmp_path).out)
    assert shards["settings"]["shards"] == str(tmp_path) and masks["settings"]["shards"] is None
    assert shards["settings"]["n_expert_used"] == masks["settings"]["n_expert_used"]
    for mask, shard in zip(masks["groups"], shards["groups"], strict=True):
        assert shard["nll"] == pytest.approx(mask["nll"], rel=0.01)
        assert shard["kl"] == pytest.approx(mask["kl"], rel=0.05)
    (tmp_path / f"{tinymoe.stem}.b.gguf").unlink()
    result = run(*options, "--shards", tmp_path)
    assert result.code == 1 and f"{tinymoe.stem}.b.gguf is missing" in result.err


def test_bad_input_is_refused_before_the_work(
    run: Callable[..., Any], cli: Cli, plan: Path, tmp_path: Path, texts: list[str]
) -> None:
    existing = tmp_path / "eval.json"
    existing.write_text("mine")
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 20)
    other = json.loads(plan.read_text())
    other["model"]["fingerprint"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(other))
    for arguments, code, said in (
        (("-o", existing), 1, "--force"),
        (("-o", tmp_path / "nowhere" / "eval.json"), 1, "does not exist"),
        (("--probe", "luck"), 2, "loss, saliency"),
        (("--prompt", "64"), 2, "leaves nothing to predict"),
        (("--windows", "3"), 2, "--windows"),
        (("--min-quality", "2"), 2, "--min-quality"),
        (("--text", f"short={short}", "--generate", "0"), 1, "'short' has 1 window of 65 tokens"),
        (("--plan", tmp_path / "other.json"), 1, "was made for the model"),
        (("--plan", tmp_path / "missing.json"), 1, "missing.json"),
        (("--shards", tmp_path), 1, "no shard of node 'a'"),
        (("--text", tmp_path / "none.txt"), 1, "none.txt"),
    ):
        result = run(*arguments)
        assert result.code == code and said in result.err.replace("\n", " "), (arguments, result.err)
        assert result.out == ""
    assert existing.read_text() == "mine"


def _without(document: dict[str, Any], *place: Any) -> None:
    for key in place[:-1]:
        document = document[key]
    del document[place[-1]]


def _set(document: dict[str, Any], value: object, *place: Any) -> None:
    for key in place[:-1]:
        document = document[key]
    document[place[-1]] = value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: _without(d, "moeshard_evaluation"), "it is no evaluation"),
        (lambda d: _set(d, 3, "moeshard_evaluation"), "version 3"),
        (lambda d: _without(d, "meter", "relation", "slope"), r"meter\.relation\.slope: is missing"),
        (lambda d: _without(d, "full", "nll"), "full.nll: is missing"),
        (lambda d: _set(d, "1", "groups", 1, "nll"), r"groups\[1\]\.nll: expected a number, got a text"),
        (lambda d: _set(d, [1], "placed", "kl_ci"), r"placed\.kl_ci: expected \[low, high\]"),
        (lambda d: _set(d, [], "groups"), "groups: is empty"),
        (lambda d: _without(d, "hashed", "domains", NAMES[1]), r"hashed\.domains: must be"),
        (lambda d: _without(d, "oracle", "kl"), r"oracle\.kl: is missing"),
        (lambda d: _set(d, "luck", "placed", "probe"), r"placed\.probe: 'luck' is not one of"),
        (lambda d: _set(d, {}, "probes", "loss"), r"probes\.loss\.nll: is missing"),
        (lambda d: _without(d, "generation", "thresholds", "entropy"), r"generation\.thresholds\.entropy: is missing"),
        (lambda d: _set(d, [3], "generation", "examples"), r"generation\.examples\[0\]: expected an object"),
        (lambda d: _set(d, True, "settings", "windows", NAMES[0]), rf"settings\.windows\.{NAMES[0]}: expected an int"),
        (lambda d: _set(d, {}, "model"), r"model\.name: is missing"),
    ],
)
def test_damaged_files_are_named(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    document = json.loads(saved.read_text())
    change(document)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(document))
    with pytest.raises(MoeshardError, match=said) as error:
        read_evaluation(path)
    assert str(path) in str(error.value)


def test_half_a_file_is_named(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    path.write_text(saved.read_text()[:2000])
    with pytest.raises(MoeshardError, match=r"evaluation '.*half.json': it is not JSON, or damaged"):
        read_evaluation(path)


def test_python_refuses_what_the_command_line_does(tinymoe: Path, plan: Path) -> None:
    with pytest.raises(MoeshardError, match="unknown probe 'luck'"):
        moeshard.evaluate(tinymoe, plan, probe="luck")  # type: ignore[arg-type]
    with pytest.raises(MoeshardError, match="n_windows at least 4"):
        moeshard.evaluate(tinymoe, plan, n_windows=3)
