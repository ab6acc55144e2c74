"""Recoveries as files: written, loaded, split, verified, gone on with, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli

import moeshard
from moeshard import MoeshardError, Plan
from moeshard.gguf.corrections import open_corrections, write_corrections
from moeshard.recovery.layer import RIDGES, foreign_corrections, harmless
from moeshard.recovery.moments import Moments, Sample
from moeshard.recovery.node import PARTIAL
from moeshard.recovery.recover import Recovered, recover
from moeshard.traffic.domains import Domain, embedded_traffic

OPTIONS: dict[str, Any] = {"n_windows": 8, "window": 64, "n_prompt": 16}
QUICK = {**OPTIONS, "passes": 1, "ridge": 0.3}


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def texts() -> list[Domain]:
    return embedded_traffic("calibration")[:2]


@pytest.fixture(scope="module")
def plan(tinymoe: Path) -> Plan:
    """One node, of every eighth expert; all text is its own."""
    keep = np.zeros((5, 128), dtype=bool)
    keep[:, ::8] = True
    return plan_of(tinymoe, keep)


def plan_of(model: Path, keep: Any, used: int | None = None) -> Plan:
    from moeshard.gguf.identity import identify
    from moeshard.shards.split import custom_plan

    return custom_plan(identify(moeshard.GGUFMap(model)), [keep], ["eighth"], used)


@pytest.fixture(scope="module")
def made(model: moeshard.Model, plan: Plan, texts: list[Domain], tmp_path_factory: pytest.TempPathFactory) -> Recovered:
    (one,) = recover(model, plan, tmp_path_factory.mktemp("recovery"), texts, **OPTIONS)
    return one


@pytest.fixture(scope="module")
def shard(tinymoe: Path, plan: Plan, made: Recovered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    (one,) = moeshard.split(tinymoe, plan, out, recovery=Path(made.path).parent)
    return Path(one.paths[0])


def test_a_recovery_says_what_it_is(made: Recovered, plan: Plan, tinymoe: Path, texts: list[Domain]) -> None:
    found = open_corrections(made.path)
    assert found.names == [f"blk.{layer}.ffn_down_exps.weight" for layer in range(5)]
    np.testing.assert_array_equal(found.keep, plan.nodes[0].keep)
    assert found.model.is_same(plan.model)
    assert found.document["texts"] == {domain.name: domain.digest for domain in texts}
    assert [layer["layer"] for layer in found.document["layers"]] == list(range(5))
    assert all(layer["after"] < layer["before"] for layer in found.document["layers"])
    info = found.file.tensor_infos[0]
    assert (info.type, info.shape) == ("q8_0", (16, 192, 32))
    assert made.bytes == made.bytes_before == 5 * info.nbytes


def test_a_file_and_no_file_compute_the_same(
    made: Recovered, plan: Plan, shard: Path, tinymoe: Path, model: moeshard.Model
) -> None:
    tokens = model.tokenize(moeshard.embedded_text("en"))[:96]
    keep = plan.nodes[0].keep
    streamed = moeshard.Model(tinymoe, keep=keep, recovery=made.path, n_threads=1).logits(tokens)
    np.testing.assert_array_equal(streamed, moeshard.Model(shard, n_threads=1).logits(tokens))
    masked = model.logits(tokens, keep)
    assert np.abs(streamed - masked).max() > 0.1  # something was corrected


def test_trunk_and_parts_hold_the_same(made: Recovered, plan: Plan, shard: Path, tinymoe: Path, tmp_path: Path) -> None:
    recovery = Path(made.path).parent
    trunk, experts = moeshard.split(tinymoe, plan, tmp_path / "once", recovery=recovery, trunk_once=True)
    joined = moeshard._core.join_segments(moeshard.GGUFMap(trunk.paths[0]), moeshard.GGUFMap(experts.paths[0]))
    for info in joined.tensor_infos:
        whole = next(other for other in moeshard.GGUFMap(shard).tensor_infos if other.name == info.name)
        data = shard.read_bytes()[whole.offset : whole.offset + whole.nbytes]
        assert joined.read(info.offset, info.nbytes) == data
    (divided,) = moeshard.split(tinymoe, plan, tmp_path / "parts", recovery=recovery, max_file_size=2 << 20)
    assert len(divided.paths) > 1
    assert len(moeshard.verify(divided.paths[0], tinymoe, recovery=made.path).corrected) == 5


def test_verify_lists_and_checks_corrected_tensors(
    made: Recovered, shard: Path, tinymoe: Path, tmp_path: Path, cli: Cli
) -> None:
    names = tuple(f"blk.{layer}.ffn_down_exps.weight" for layer in range(5))
    assert moeshard.verify(shard, tinymoe).corrected == names
    assert moeshard.verify(shard, tinymoe, recovery=made.path).corrected == names
    said = cli("verify", shard, "--source", "tinymoe")
    assert said.code == 0
    assert "5 corrected tensors" in said.out and names[3] in said.out

    damaged = tmp_path / "damaged.gguf"
    data = bytearray(shard.read_bytes())
    info = next(info for info in moeshard.GGUFMap(shard).tensor_infos if info.name == names[2])
    data[info.offset + 1000] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(MoeshardError, match=rf"'{names[2]}' is not as it was written"):
        moeshard.verify(damaged, tinymoe)
    data[info.offset + 1000] ^= 1
    other = next(info for info in moeshard.GGUFMap(shard).tensor_infos if info.name == "blk.1.ffn_up_exps.weight")
    data[other.offset + 1000] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(MoeshardError, match=r"blk\.1\.ffn_up_exps\.weight' \(expert \d+ of the model\) differs"):
        moeshard.verify(damaged, tinymoe)
    with pytest.raises(MoeshardError, match="computes something else than the masked model"):
        moeshard.verify(shard, tinymoe, logits=True)


def test_merge_refuses_a_corrected_shard(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(MoeshardError, match="corrected for the experts that it holds"):
        moeshard.merge([shard], tmp_path / "whole.gguf")


def test_the_same_run_gives_the_same_file_and_resuming_too(
    model: moeshard.Model, plan: Plan, texts: list[Domain], made: Recovered, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop_after(layer: str) -> Callable[[str, float], None]:
        def stop(stage: str, _: float) -> None:
            if stage.endswith(layer):
                raise Stop

        return stop

    with pytest.raises(Stop):
        recover(model, plan, tmp_path, texts, progress=stop_after("layer 3"), **OPTIONS)
    partial = tmp_path / (Path(made.path).name + PARTIAL)
    assert not (tmp_path / Path(made.path).name).exists()
    assert len(open_corrections(partial).document["layers"]) == 3
    with pytest.raises(MoeshardError, match="begun with another 'parts'"):
        recover(model, plan, tmp_path, texts, resume=True, parts=["down"], **OPTIONS)
    stages = []
    (one,) = recover(
        model, plan, tmp_path, texts, resume=True, progress=lambda stage, _: stages.append(stage), **OPTIONS
    )
    assert {stage for stage in stages if "layer" in stage} == {"eighth: layer 3", "eighth: layer 4"}
    assert one.layers == made.layers
    assert not partial.exists()
    ours, theirs = open_corrections(one.path), open_corrections(made.path)
    for name in theirs.names:
        np.testing.assert_array_equal(ours.file.tensors[name], theirs.file.tensors[name])


def test_a_layer_that_a_correction_does_not_help_is_left_alone(
    model: moeshard.Model, plan: Plan, texts: list[Domain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held at almost nothing, a fit follows the noise of a short text, and other text is worse off."""
    (one,) = recover(model, plan, tmp_path, texts, ridge=1e-9, parts=["down"], n_windows=8, window=16, n_prompt=8)
    left = [layer for layer in one.layers if not layer.corrected]
    assert left
    assert all(layer.before == layer.after and layer.ridge is None for layer in left)
    names = open_corrections(one.path).names if len(left) < 5 else []
    assert not {f"blk.{layer.layer}.ffn_down_exps.weight" for layer in left} & set(names)


def test_a_recovery_that_corrects_nothing(model: moeshard.Model, plan: Plan, tinymoe: Path, tmp_path: Path) -> None:
    """No layer was better off: the shard is the model's own, and says nothing of corrections."""
    keep, path = plan.nodes[0].keep, tmp_path / "none.gguf"
    write_corrections(path, plan.model, keep, [], {})
    tokens = np.arange(30)
    loaded = moeshard.Model(tinymoe, keep=keep, recovery=path, n_threads=1)
    as_it_is = moeshard.Model(tinymoe, keep=keep, n_threads=1)
    np.testing.assert_array_equal(loaded.logits(tokens), as_it_is.logits(tokens))
    moeshard.split(tinymoe, keep, tmp_path / "shard.gguf", recovery=path)
    moeshard.split(tinymoe, keep, tmp_path / "plain.gguf")
    assert (tmp_path / "shard.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_passes_take_layers_together(
    model: moeshard.Model, plan: Plan, texts: list[Domain], made: Recovered, tmp_path: Path
) -> None:
    stages: list[str] = []
    (one,) = recover(model, plan, tmp_path, texts, passes=2, progress=lambda s, _: stages.append(s), **OPTIONS)
    assert {stage for stage in stages if "layer" in stage} == {"eighth: layers 0-2", "eighth: layers 3-4"}
    assert [layer.layer for layer in one.layers] == list(range(5))
    assert one.layers[0] == made.layers[0]  # nothing before it is corrected, whatever follows
    assert all(layer.after < layer.before for layer in one.layers)


@pytest.mark.parametrize("kind", ["q4_0", "f16", "iq4_nl"])
def test_types(kind: str, model: moeshard.Model, plan: Plan, texts: list[Domain], tmp_path: Path) -> None:
    (one,) = recover(model, plan, tmp_path, texts, recover_type=kind, **QUICK)
    found = open_corrections(one.path)
    assert {info.type for info in found.file.tensor_infos} == {kind}
    loaded = moeshard.Model(model.path, keep=plan.nodes[0].keep, recovery=one.path, n_threads=1)
    assert np.isfinite(loaded.logits(np.arange(40))).all()


def test_other_experts_per_token(
    model: moeshard.Model, tinymoe: Path, plan: Plan, texts: list[Domain], tmp_path: Path
) -> None:
    four = plan_of(tinymoe, plan.nodes[0].keep, 4)
    recover(model, four, tmp_path, texts, **QUICK)
    (one,) = moeshard.split(tinymoe, four, tmp_path / "shards", recovery=tmp_path)
    assert moeshard.Model(one.paths[0], n_threads=1).n_expert_used == 4
    with pytest.raises(MoeshardError, match="was made for 4 experts per token, not for the model's own number"):
        moeshard.split(tinymoe, plan, tmp_path / "others", recovery=tmp_path)


def test_evaluate_runs_corrected_nodes(
    model: moeshard.Model, plan: Plan, made: Recovered, shard: Path, texts: list[Domain]
) -> None:
    options: dict[str, Any] = {"n_windows": 4, "window": 64, "n_prompt": 16, "n_answers": 0}
    held_out = embedded_traffic("heldout")[:2]
    corrected = moeshard.evaluate(model, plan, held_out, recovery=Path(made.path).parent, **options)
    files = moeshard.evaluate(model, plan, held_out, shards=shard.parent, **options)
    assert corrected.groups[0].scores == files.groups[0].scores
    assert corrected.settings.recovery == str(Path(made.path).parent)
    assert files.settings.recovery is None
    assert not corrected.settings.likeness.seen
    fitted_to = moeshard.evaluate(model, plan, texts, recovery=Path(made.path).parent, **options)
    assert fitted_to.settings.likeness.seen == [domain.name for domain in texts]
    with pytest.raises(MoeshardError, match="give shards or a recovery"):
        moeshard.evaluate(model, plan, held_out, recovery=Path(made.path).parent, shards=shard.parent, **options)


def test_refusals(
    model: moeshard.Model, plan: Plan, made: Recovered, texts: list[Domain], tinymoe: Path, tmp_path: Path
) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(MoeshardError, match=match):
            recover(model, plan, tmp_path / "none", texts, **{**OPTIONS, **options})
        assert not (tmp_path / "none").exists()

    refused("no type 'q9' can be made", recover_type="q9")
    refused("unknown part 'up'", parts=["up"])
    refused("passes must be positive", passes=0)
    refused("ridge must be positive", ridge=0.0)
    refused("has no node 'other'; it has eighth", nodes=["other"])
    refused("the text is too short to fit experts to: 4 windows", n_windows=2)
    with pytest.raises(MoeshardError, match="exists"):
        recover(model, plan, Path(made.path).parent, texts, **OPTIONS)
    other = np.roll(plan.nodes[0].keep, 1, axis=1)
    with pytest.raises(MoeshardError, match="was made for other experts"):
        moeshard.Model(tinymoe, keep=other, recovery=made.path)
    with pytest.raises(MoeshardError, match="is no recovery"):
        moeshard.Model(tinymoe, keep=plan.nodes[0].keep, recovery=tinymoe)
    with pytest.raises(MoeshardError, match="goes with the path of a whole model and the keep"):
        moeshard.Model(tinymoe, recovery=made.path)
    with pytest.raises(MoeshardError, match="has no recovery of node 'eighth'"):
        moeshard.evaluate(model, plan, texts, recovery=tmp_path)


def test_command_line(tinymoe: Path, plan: Plan, texts: list[Domain], tmp_path: Path, cli: Cli) -> None:
    plan.write(tmp_path / "plan.json")
    (tmp_path / "en.txt").write_text(texts[0].texts[0][:40000], encoding="utf-8")
    text = ["--text", f"mine={tmp_path / 'en.txt'}", "--windows", "10", "--window", "64", "--passes", "1"]
    out = tmp_path / "out"
    done = cli("recover", "tinymoe", "--plan", tmp_path / "plan.json", *text, "-o", out, "--threads", "1", "--json")
    assert done.code == 0, done.err
    (one,) = json.loads(done.out)["recoveries"]
    assert one["node"] == "eighth" and Path(one["path"]).is_file() and one["windows"] == 10
    again = cli("recover", "tinymoe", "--plan", tmp_path / "plan.json", *text, "-o", out, "--threads", "1")
    assert again.code == 1 and "--force" in again.err
    split = ["split", "tinymoe", "--plan", tmp_path / "plan.json", "--recovery", out, "-o", tmp_path / "shards"]
    assert cli(*split).code == 0
    assert cli("split", "tinymoe", "--keep", "0-63", "--recovery", out, "-o", tmp_path / "one.gguf").code == 2


@pytest.mark.slow
def test_text_of_a_kind_that_nothing_was_fitted_to_is_not_worse_off(
    model: moeshard.Model, tinymoe: Path, tmp_path: Path
) -> None:
    """Code is left out of the fit, and predicted."""
    keep = np.zeros((5, 128), dtype=bool)
    keep[:, ::4] = True
    plan = plan_of(tinymoe, keep)
    code = {"cpp", "py", "sh"}
    fitted = [domain for domain in embedded_traffic("calibration") if domain.name not in code]
    foreign = [domain for domain in embedded_traffic("heldout") if domain.name in code]
    recover(model, plan, tmp_path, fitted, n_windows=10, window=128)
    options: dict[str, Any] = {"n_windows": 4, "window": 128, "n_prompt": 16, "n_answers": 0}
    before = moeshard.evaluate(model, plan, foreign, **options)
    after = moeshard.evaluate(model, plan, foreign, recovery=tmp_path, **options)
    assert after.placed.excess < before.placed.excess
    now, then = after.placed.agreement, before.placed.agreement
    assert now is not None and then is not None
    assert now.kl < then.kl


def test_a_ridge_that_harms_other_kinds_of_text_is_not_taken() -> None:
    """Two kinds of text want opposite things of the one expert that both use."""
    rng = np.random.default_rng(1)
    ids = np.zeros((200, 1), dtype=np.int32)
    features = rng.standard_normal((200, 1, 4)).astype(np.float32)
    wanted = rng.standard_normal((4, 3)).astype(np.float32)
    moments = Moments(1, 4, 3)
    moments.add(ids, features, features[:, 0] @ wanted)
    corrections = foreign_corrections(moments, RIDGES)
    alike, unlike, orthogonal = Sample(200), Sample(200), Sample(200)
    alike.add(ids, features, features[:, 0] @ wanted)
    unlike.add(ids, features, -features[:, 0] @ wanted)
    # Some of what it wants is there too: a mild correction helps, all of it is too much.
    orthogonal.add(ids, features, features[:, 0] @ (0.4 * wanted))
    assert harmless(corrections, alike) == sorted(RIDGES, reverse=True)
    assert harmless(corrections, unlike) == []
    assert harmless(corrections, orthogonal) == [ridge for ridge in sorted(RIDGES, reverse=True) if ridge >= 0.3]
