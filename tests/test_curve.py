"""The curve of loss by experts kept: against the losses that it is made of, its files, its figure, and what it says."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli

import moeshard
from moeshard import MoeshardError
from moeshard.evaluation.curve import Curve, Point, default_sizes, lone_node, measure_curve, read_curve, rule_of_thumb
from moeshard.evaluation.losses import measure_losses
from moeshard.evaluation.scores import Agreement, Scores
from moeshard.planning.planner import choose_experts
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile
from moeshard.traffic.domains import Domain
from moeshard.traffic.embedded import embedded_domains, embedded_text

WINDOW, PROMPT, WINDOWS = 64, 16, 4
STRATEGIES = ("ranked", "one-list", "contiguous")


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def names() -> list[str]:
    return embedded_domains()[:2]


@pytest.fixture(scope="module")
def profile(model: moeshard.Model, names: list[str]) -> Profile:
    texts = [Domain(name, (embedded_text(name, "calibration"),)) for name in names]
    return analyze(model, texts, n_tokens=2048, window=128)


@pytest.fixture(scope="module")
def domains(names: list[str]) -> list[Domain]:
    return [Domain(name, (embedded_text(name),)) for name in names]


@pytest.fixture(scope="module")
def sizes(model: moeshard.Model) -> list[int]:
    return [4 * model.n_expert_used, 8 * model.n_expert_used, model.n_expert]


@pytest.fixture(scope="module")
def curve(model: moeshard.Model, profile: Profile, domains: list[Domain], sizes: list[int]) -> Curve:
    return measure_curve(
        model,
        profile,
        domains,
        sizes=sizes[::-1],
        strategies=STRATEGIES,
        n_windows=WINDOWS,
        window=WINDOW,
        n_prompt=PROMPT,
    )


def made_up(ratios: dict[int, float], n_expert_used: int = 8) -> Curve:
    """A curve of one strategy whose perplexities are these times the whole model's."""

    def scores(excess: float) -> Scores:
        near = Agreement(0.1, (0.1, 0.1), 0.2, 0.9, (0.9, 0.9))
        own = Scores(3 + excess, (3, 4), excess, (excess - 0.1, excess + 0.1), near)
        return replace(own, domains={"a": own, "b": own})

    points = [Point(keep, scores(float(np.log(ratio)))) for keep, ratio in ratios.items()]
    model = moeshard.gguf.identity.ModelIdentity("made up", "qwen3moe", "0" * 64, 2, 128, [0, 1])
    full = replace(scores(0), agreement=None)
    return Curve(model, {"ranked": points}, full, {"n_expert_used": n_expert_used, "confidence": 0.9})


def test_points_are_the_losses_of_their_keeps(
    model: moeshard.Model, profile: Profile, domains: list[Domain], sizes: list[int], curve: Curve
) -> None:
    assert list(curve.strategies) == list(STRATEGIES) and curve.domains == [domain.name for domain in domains]
    for name, points in curve.strategies.items():
        assert [point.keep for point in points] == sizes
        keeps = [lone_node(profile, size, name) for size in sizes]
        losses = measure_losses(model, keeps, domains, n_windows=WINDOWS, window=WINDOW, n_prompt=PROMPT)
        for point, groups in zip(points, losses.groups, strict=True):
            per_window = (groups - losses.full)[:, PROMPT:].mean(axis=1)
            by_domain = [per_window[losses.domain == index].mean() for index in range(len(domains))]
            # Batches of another size round otherwise, and quantised activations make steps of that.
            assert point.scores.excess == pytest.approx(np.mean(by_domain), abs=0.03)
            own = [scores.excess for scores in point.scores.domains.values()]
            assert own == pytest.approx(by_domain, abs=0.05)
            assert point.scores.excess_ci[0] <= point.scores.excess <= point.scores.excess_ci[1]


def test_the_ends_of_the_curve(curve: Curve) -> None:
    for points in curve.strategies.values():
        # All experts are the whole model; fewer cost something.
        assert points[-1].scores.ratio == pytest.approx(1, abs=1e-3)
        assert points[0].scores.excess_ci[0] > 0.05
    at_quarter = {name: points[0].scores.excess for name, points in curve.strategies.items()}
    assert at_quarter["ranked"] < at_quarter["contiguous"]


def test_what_lone_nodes_hold(profile: Profile) -> None:
    size = profile.n_expert // 4
    kept = {name: lone_node(profile, size, name)[profile.layers] for name in STRATEGIES}
    assert all((rows.sum(axis=1) == size).all() for rows in kept.values())
    for row, scores in zip(kept["ranked"], profile.total("saliency"), strict=True):
        assert scores[row].min() >= scores[~row].max()
    # The same ids in every layer: those of most mass, added up over layers.
    assert (kept["one-list"] == kept["one-list"][0]).all()
    mass = profile.total("mass").sum(axis=0)
    assert mass[kept["one-list"][0]].min() >= mass[~kept["one-list"][0]].max() * (1 - 1e-6)
    assert (kept["ranked"] != kept["ranked"][0]).any()
    assert kept["contiguous"][:, :size].all()
    # Islands of one node are that node: no others are beside it.
    np.testing.assert_array_equal(lone_node(profile, size, "islands"), choose_experts(profile, [size], "islands")[0])
    for strategy in ("snake", "balanced", "shared-core", "coactivation"):
        with pytest.raises(MoeshardError, match=f"'{strategy}' deals experts out.* contiguous, one-list"):
            lone_node(profile, size, strategy)


def test_default_sizes() -> None:
    assert default_sizes(128, 8) == [16, 24, 32, 48, 64, 96, 128]
    assert default_sizes(8, 2) == [2, 4, 6, 8]
    assert default_sizes(60, 4) == [8, 12, 15, 16, 24, 30, 32, 48, 60]
    assert all(size % 8 == 0 for size in default_sizes(256, 6, 8)) and default_sizes(256, 6, 8)[-1] == 256
    assert default_sizes(4, 4) == [4]


def test_files_come_back(curve: Curve, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    curve.save(path)
    found = read_curve(path)
    assert found == curve
    document = json.loads(path.read_text())
    point = document["strategies"]["ranked"][0]
    used, n_expert = curve.n_expert_used, curve.model.n_expert
    assert document["moeshard_curve"] == 1 and document["domains"] == curve.domains
    assert (point["keep"], point["fraction"], point["times_top_k"]) == (4 * used, 4 * used / n_expert, 4)
    assert point["ratio"] == pytest.approx(np.exp(point["nll"] - document["full"]["nll"]))
    with pytest.raises(MoeshardError, match="--force"):
        curve.save(path)

    rows = list(csv.DictReader(io.StringIO(curve.to_csv())))
    assert len(rows) == len(STRATEGIES) * 3 * (1 + len(curve.domains))
    assert {row["domain"] for row in rows} == {"all", *curve.domains}
    first = rows[0]
    assert (first["strategy"], int(first["keep"]), first["domain"]) == ("ranked", point["keep"], "all")
    for key in ("fraction", "times_top_k", "nll", "excess", "ratio", "kl", "top1"):
        assert float(first[key]) == point[key]
    assert [float(first["ratio_low"]), float(first["ratio_high"])] == point["ratio_ci"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("moeshard_curve"), "is no curve"),
        (lambda d: d.update(moeshard_curve=2), "update moeshard"),
        (lambda d: d["strategies"]["ranked"][1].pop("keep"), r"strategies.ranked\[1\].keep: is missing"),
        (lambda d: d["strategies"]["ranked"][1].pop("kl"), r"strategies.ranked\[1\].kl: is missing"),
        (lambda d: d["strategies"]["ranked"].clear(), "strategies.ranked: is empty"),
        (lambda d: d["strategies"].clear(), "strategies: is empty"),
        (lambda d: d["settings"].pop("n_expert_used"), "settings.n_expert_used: is missing"),
        (lambda d: d["settings"].update(n_expert_used=0), "settings.n_expert_used"),
        (lambda d: d["full"].pop("nll"), "full.nll: is missing"),
    ],
)
def test_damaged_files_say_where(change: object, said: str, tmp_path: Path) -> None:
    document = made_up({32: 2.0, 64: 1.2}).to_json()
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(document))
    assert read_curve(path).to_json() == document
    assert callable(change)
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(MoeshardError, match=f"curve.json.*{said}"):
        read_curve(path)


def test_the_rule_of_thumb_is_told_as_measured() -> None:
    (said,) = rule_of_thumb(made_up({16: 3.0, 32: 2.0, 64: 1.25, 96: 1.05, 128: 1.0}))
    assert "at 4 x top-k (32 of 128 experts) perplexity is 2.00 (1.81 to 2.21)" in said
    assert "at 8 x top-k (64 of 128 experts) perplexity is 1.25" in said
    assert "from 96 experts (12 x top-k) on" in said
    # A dip that does not last is not enough.
    assert "from 96 experts" in rule_of_thumb(made_up({32: 1.05, 64: 1.25, 96: 1.05}))[0]
    assert "no number that was measured" in rule_of_thumb(made_up({32: 2.0, 64: 1.25}))[0]
    assert "only all experts" in rule_of_thumb(made_up({64: 1.25, 128: 1.0}))[0]
    assert "4 x top-k (8 of 128" in rule_of_thumb(made_up({8: 2.0, 64: 1.25}, n_expert_used=2))[0]


def test_the_figure_shows_the_figures(curve: Curve) -> None:
    from matplotlib.figure import Figure

    from moeshard.report.figures.curve import draw_curve

    canvas = Figure()
    draw_curve(canvas, curve)
    axes = canvas.axes[0]
    bars = {str(container.get_label()): container for container in axes.containers}
    assert list(bars) == list(STRATEGIES)
    for name, points in curve.strategies.items():
        line, _, (spans,) = bars[name]
        assert list(line.get_xdata()) == [point.keep for point in points]
        assert list(line.get_ydata()) == [point.scores.excess for point in points]
        ends = np.array([np.asarray(segment)[:, 1] for segment in spans.get_segments()], dtype=float)
        np.testing.assert_allclose(ends, [point.scores.excess_ci for point in points], atol=1e-9)
    assert "nats per token" in axes.get_ylabel() and "experts kept per layer" in axes.get_xlabel()
    above, beside = axes.child_axes
    assert [float(tick) for tick in above.get_xticks()] == [p.keep / curve.n_expert_used for p in points]
    assert "perplexity" in beside.get_ylabel()
    # A lone strategy also shows its domains, by name.
    alone = Figure()
    draw_curve(alone, replace(curve, strategies={"ranked": curve.strategies["ranked"]}))
    assert {text.get_text() for text in alone.axes[0].texts} == set(curve.domains)


def test_bad_requests_are_named(
    model: moeshard.Model, profile: Profile, domains: list[Domain], sizes: list[int]
) -> None:
    for options, said in (
        ({"sizes": [model.n_expert_used - 1]}, "a token uses"),
        ({"sizes": [model.n_expert + 1]}, "cannot hold"),
        ({"sizes": []}, "at least one"),
        ({"strategies": ["best"]}, "unknown strategy 'best'"),
        ({"strategies": ["snake"]}, "'snake' deals experts out to several nodes.*choose from ranked, reap, islands"),
        ({"n_windows": 3}, "has 3 windows of"),
        ({"strategies": ["ranked", "ranked"]}, "differ"),
        ({"window": 10**6}, "too short"),
    ):
        with pytest.raises(MoeshardError, match=said):
            measure_curve(model, profile, domains, **{"sizes": sizes, "n_windows": 4, **options})  # type: ignore[arg-type]
    other = replace(profile, model=replace(profile.model, fingerprint="0" * 64))
    with pytest.raises(MoeshardError, match="analyze this model"):
        measure_curve(model, other, domains)


def test_command_line(
    cli: Cli, model: moeshard.Model, profile: Profile, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.save(tmp_path / "p.npz")
    texts: list[str | Path] = []
    for name in names:
        (tmp_path / f"{name}.txt").write_text(embedded_text(name)[:4000], encoding="utf-8")
        texts += ["--text", tmp_path / f"{name}.txt"]
    half = model.n_expert // 2
    base = ("curve", "tinymoe", "--profile", tmp_path / "p.npz", "--threads", 1, *texts)
    small = (*base, "--windows", 4, "--window", 64, "--prompt", 16, "--keep", f"{half},{model.n_expert}")
    files = [tmp_path / name for name in ("c.json", "c.csv", "c.png")]
    written = (*small, "-o", files[0], "--csv", files[1], "--png", files[2])
    done = cli(*written, "--strategies", "ranked,contiguous")
    table, rule = done.out.split("rule of thumb")
    assert done.code == 0 and table.count("contiguous") == 2 and f" {half} " in table and "…" not in table
    assert "ranked: " in rule
    assert files[2].read_bytes().startswith(b"\x89PNG") and files[1].read_text().startswith("strategy,keep")
    assert list(read_curve(files[0]).strategies) == ["ranked", "contiguous"]
    again = cli(*written)
    assert again.code == 1 and "--force" in again.err
    told = json.loads(cli(*small, "--json").out)
    assert [point["keep"] for point in told["strategies"]["ranked"]] == [half, model.n_expert]
    assert told["domains"] == names

    # Text that experts were chosen by says too little of what is lost.
    (tmp_path / "seen.txt").write_text(embedded_text(names[0], "calibration"), encoding="utf-8")
    seen = cli(*base[:6], "--text", tmp_path / "seen.txt", *small[len(base) :])
    assert seen.code == 0 and "experts were chosen by text 'seen' too" in seen.err
    assert "warning" not in done.err

    assert cli(*base, "--keep", "many").code == 2
    wrong = cli(*base, "--strategies", "best")
    assert wrong.code == 2 and "'best'" in wrong.err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = cli(*small, "--png", tmp_path / "new.png")
    assert missing.code == 1 and "moeshard[report]" in missing.err and not (tmp_path / "new.png").exists()
