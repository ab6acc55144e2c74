"""Files that releases wrote are read for ever: every value in them, and what their shards compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_readers import READERS, last_logits, open_models

import moeshard
from moeshard import MoeshardError

HERE = Path(__file__).parent
RELEASES = sorted(path.name for path in HERE.iterdir() if path.is_dir() and path.name[0].isdigit())
# Of the largest logit. Weights are in float32, but keys and values are cached in half precision (2**-11), where sums in
# another order may round the other way.
ROUNDING = 2e-3


@pytest.fixture(params=RELEASES)
def folder(request: pytest.FixtureRequest) -> Path:
    return HERE / str(request.param)


def expected(folder: Path, what: str) -> Any:
    return json.loads((folder / "expected.json").read_text())[what]


def as_json(value: object) -> Any:
    return json.loads(json.dumps(value))


def test_there_are_releases() -> None:
    assert "0.1.0" in RELEASES


@pytest.mark.parametrize("what", READERS)
def test_every_value_is_read_as_it_was_written(folder: Path, what: str) -> None:
    found, wanted = as_json(READERS[what](folder)), expected(folder, what)
    if what == "evaluation":
        # How often intervals were drawn by a bootstrap: they are computed otherwise now, and those written down stay.
        wanted["settings"].pop("resamples", None)
        if "recovery" not in wanted["settings"]:
            assert found["settings"].pop("recovery") is None
        # Texts that experts were chosen by: one of several things that are said about likeness now.
        if "seen" in wanted["settings"]:
            assert found["settings"].pop("likeness")["seen"] == wanted["settings"].pop("seen")
    assert found == wanted


def test_shards_compute_what_they_did(folder: Path) -> None:
    before = expected(folder, "logits")
    models = open_models(folder)
    assert set(models) == set(before)
    for name, model in models.items():
        logits, then = np.array(last_logits(model)), np.array(before[name])
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(logits, then, rtol=0, atol=ROUNDING * np.abs(then).max(), err_msg=name)


def test_a_shard_is_the_model_under_its_keep(folder: Path) -> None:
    models, plan = open_models(folder), moeshard.read_plan(folder / "plan.json")
    masked = np.array(last_logits(models["model.gguf"], plan.nodes[0].keep))
    whole = np.array(last_logits(models["model.gguf"]))
    near = ROUNDING * np.abs(masked).max()
    for name in ("shard.gguf", "once"):
        np.testing.assert_allclose(last_logits(models[name]), masked, rtol=0, atol=near, err_msg=name)
    assert np.abs(whole - masked).max() > 10 * near  # dropping experts is seen


def test_profile_adds_up(folder: Path) -> None:
    profile = moeshard.read_profile(folder / "profile.npz")
    model = moeshard.GGUFMap(folder / "model.gguf")
    used = max(model.moe_layout().n_expert_used)
    tokens = profile.n_tokens
    np.testing.assert_array_equal(profile.count.sum(axis=2), used * np.repeat(tokens[:, None], profile.layers.size, 1))
    # A token's weights add up to 1; the pairs of experts that it chose number used².
    np.testing.assert_allclose(profile.mass.sum(axis=2), np.repeat(tokens[:, None], profile.layers.size, 1), rtol=1e-5)
    assert profile.together.sum() == used**2 * tokens.sum() * profile.layers.size
    per_domain = [profile.energy[profile.domain == d].sum(axis=0) for d in range(len(profile.domains))]
    np.testing.assert_allclose(np.einsum("dmee->dme", profile.cosaliency), per_domain, rtol=1e-4)
    # And it is good for a plan, today.
    plan = moeshard.make_plan(model, profile, n_keep=[3, 3])
    plan.check(moeshard.read_plan(folder / "plan.json").model)


def test_plan_is_split_and_placed_by(folder: Path, tmp_path: Path) -> None:
    plan = moeshard.read_plan(folder / "plan.json")
    shards = moeshard.split(folder / "model.gguf", plan, tmp_path / "shards")
    assert [shard.n_expert for shard in shards] == [3, 4]
    for shard in shards:
        moeshard.verify(shard.paths[0], folder / "model.gguf")
    placed = moeshard.Placement(plan, folder / "model.gguf").place("12345678901234567890", probe="saliency")
    assert placed.captured is not None and set(placed.captured) == {"node-0", "node-1"}


@pytest.mark.parametrize(("file", "key"), [("plan.json", "moeshard_plan"), ("evaluation.json", "moeshard_evaluation"),
                                           ("curve.json", "moeshard_curve")])  # fmt: skip
def test_a_version_to_come_is_refused(folder: Path, tmp_path: Path, file: str, key: str) -> None:
    document = json.loads((folder / file).read_text())
    document[key] = 1000
    (tmp_path / file).write_text(json.dumps(document))
    read = {"plan.json": moeshard.read_plan, "evaluation.json": moeshard.read_evaluation}.get(file, moeshard.read_curve)
    with pytest.raises(MoeshardError, match=r"1000") as caught:
        read(tmp_path / file)
    assert file in str(caught.value)
