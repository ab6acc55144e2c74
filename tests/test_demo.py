"""The demo's arithmetic on small numbers, its claims on the embedded model, and the texts it stands on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard.cli import main
from moeshard.demo import Demo, routed, run_demo, top_experts
from moeshard.runtime.trace import Trace
from moeshard.traffic import embedded


@pytest.fixture(scope="module")
def model() -> moeshard.Model:
    return moeshard.Model(moeshard.embedded_model(), n_threads=1)


@pytest.fixture(scope="module")
def demo(model: moeshard.Model) -> Demo:
    return run_demo(model, "de", max_tokens=8, n_windows=1, n_calibration=8)


def test_routed_sums_weights_and_norms() -> None:
    ids = np.array([[[0, 2], [2, 1]], [[3, -1], [3, -1]]], dtype=np.int32)
    weights = np.array([[[0.75, 0.25], [0.5, 0.5]], [[1, 0], [1, 0]]], dtype=np.float32)
    mass = routed(Trace((0, 2), ids, weights), 3, 4)
    assert mass.tolist() == [[0.75, 0.5, 0.75, 0], [0] * 4, [0, 0, 0, 2]]
    norms = np.full_like(weights, 2)
    assert np.array_equal(routed(Trace((0, 2), ids, weights, None, norms), 3, 4), 2 * mass)


def test_top_experts_takes_the_first_among_equals() -> None:
    keep = top_experts(np.array([[1.0, 3, 2, 2], [0, 0, 0, 0]]), 2)
    assert keep.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_three_runs_of_equal_halves(model: moeshard.Model, demo: Demo) -> None:
    full, best, first = demo.runs
    assert full.keep is None
    assert best.keep is not None
    assert first.keep is not None
    for run in (best, first):
        assert run.keep is not None
        assert (run.keep.sum(axis=1) == 64).all()
    assert first.keep[:, :64].all()
    assert (best.keep[0] != best.keep[1]).any()  # chosen per layer
    assert best.bytes == first.bytes == model.trunk_bytes + model.expert_bytes // 2
    assert full.bytes == model.trunk_bytes + model.expert_bytes


def test_every_run_is_measured_alike(model: moeshard.Model, demo: Demo) -> None:
    for run in demo.runs:
        assert {domain: result.n_tokens for domain, result in run.scores.items()} == dict.fromkeys(
            embedded.embedded_domains(), 256
        )
        assert run.text
        assert run.tokens_per_second > 0
        assert run.prompt_tokens_per_second > 0
        assert list(run.top_experts) == model.moe_layers
        for layer, tops in run.top_experts.items():
            shares = [top.share for top in tops]
            assert shares == sorted(shares, reverse=True)
            assert 0 < sum(shares) <= 1
            assert run.keep is None or all(run.keep[layer, top.id] for top in tops)


def test_the_half_chosen_for_a_text_serves_it_best(demo: Demo) -> None:
    full, best, first = (run.scores["de"].perplexity for run in demo.runs)
    assert full < best < first
    assert demo.loss(demo.runs[1], "de") < 0.5 * demo.loss(demo.runs[2], "de")


def test_unknown_domain_is_refused_before_anything_is_computed(model: moeshard.Model) -> None:
    with pytest.raises(moeshard.MoeshardError, match=r"no embedded text 'klingon'; choose from: .*de"):
        run_demo(model, "klingon", progress=lambda *_: pytest.fail("computed"))


def test_progress_reaches_the_end(model: moeshard.Model) -> None:
    seen: list[tuple[str, int, int]] = []
    run_demo(model, max_tokens=1, n_windows=1, n_calibration=1, progress=lambda *step: seen.append(step))
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("columns", [80, 120])
def test_command(columns: int, demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("moeshard.demo.run_demo", lambda *_, **__: demo)
    monkeypatch.setattr(sys, "argv", ["moeshard", "demo"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= columns
    for text in (
        "all experts",
        "best half for de",
        "first half",
        "64 of 128",
        "perplexity de",
        "moeshard inspect MODEL",
    ):
        assert text in out
    # What the command was asked for comes first.
    assert out.index("perplexity de") < out.index("perplexity cpp")


def test_command_json(demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["moeshard", "demo", "--json", "--windows", "1", "-n", "2"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == demo.to_dict().keys()
    full, best, first = found["runs"]
    assert full["keep"] is None
    assert first["keep"] == ["0-63"] * 5
    assert best["perplexity_loss"]["en"] < first["perplexity_loss"]["en"]


class TestTexts:
    @pytest.fixture
    def data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "heldout").mkdir()
        (tmp_path / "heldout" / "xx.txt").write_bytes("first é\nsecond\nthird é\n".encode())
        monkeypatch.setattr(embedded, "_data", lambda: tmp_path)
        return tmp_path

    def test_halves_of_a_heldout_text(self, data: Path) -> None:
        assert embedded.embedded_domains() == ["xx"]
        calibration, heldout = (embedded.embedded_text("xx", part) for part in ("calibration", "heldout"))
        assert (calibration, heldout) == ("first é\nsecond\n", "third é\n")

    def test_calibration_text_of_its_own(self, data: Path) -> None:
        (data / "calibration").mkdir()
        (data / "calibration" / "xx.txt").write_text("other")
        assert embedded.embedded_text("xx", "calibration") == "other"
        assert embedded.embedded_text("xx").startswith("first")

    def test_cut_character_is_left_out(self, data: Path) -> None:
        (data / "calibration").mkdir()
        (data / "calibration" / "xx.txt").write_bytes("é caf".encode()[1:] + b"\xc3")
        assert embedded.embedded_text("xx", "calibration") == " caf"

    def test_incomplete_installation(self, data: Path) -> None:
        with pytest.raises(moeshard.MoeshardError, match=r"incomplete: .*tinymoe.gguf is missing"):
            embedded.embedded_model()

    def test_model_argument(self) -> None:
        assert embedded.resolve_model("tinymoe") == embedded.embedded_model()
        assert embedded.resolve_model("./tinymoe") == Path("tinymoe")
