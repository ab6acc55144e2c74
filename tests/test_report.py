"""The report: its numbers against plain numpy, its page as a browser reads it, and files that are not right."""

from __future__ import annotations

import base64
import csv
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli

import moeshard
from moeshard import MoeshardError, Plan, PlanNode
from moeshard.evaluation.curve import Curve, measure_curve
from moeshard.evaluation.record import Evaluation, read_evaluation
from moeshard.evaluation.scores import Agreement, Scores
from moeshard.gguf.identity import ModelIdentity
from moeshard.planning.planner import choose_experts
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile
from moeshard.profile.statistics import captured
from moeshard.report.colours import GROUNDS, LINES, PALETTE, contrast, readable_on
from moeshard.report.figures.evaluation import comparison
from moeshard.report.sources import Sources, read_sources
from moeshard.report.summary import summary
from moeshard.report.writing import figures, folder_of, write_report
from moeshard.traffic.domains import Domain
from moeshard.traffic.likeness import Likeness

NASTY = "<script>alert(1)</script> \"a\" & 'b' $x_1$ ]]>"
FIGURES = {
    *("comparison", "losses", "captured", "overlap", "loops", "keep-fraction-loss", "keep-fraction", "heatmap"),
    *("concentration", "super-experts"),
}


@pytest.fixture(scope="module")
def domains() -> list[Domain]:
    return [Domain(name, (moeshard.embedded_text(name)[:6000],)) for name in ("en", "py", "fr")]


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def profile(model: moeshard.Model, domains: list[Domain]) -> Profile:
    return analyze(model, domains, window=64)


@pytest.fixture(scope="module")
def plan(profile: Profile) -> Plan:
    half = profile.n_expert // 2
    keeps = choose_experts(profile, [half, half // 2, half], "islands", restarts=2)
    nodes = [PlanNode(f"node-{index}", keep) for index, keep in enumerate(keeps)]
    return Plan(nodes, "islands", {}, profile.model)


@pytest.fixture(scope="module")
def curve(model: moeshard.Model, profile: Profile, domains: list[Domain]) -> Curve:
    sizes = [profile.n_expert // 2, profile.n_expert]
    return measure_curve(
        *(model, profile, domains),
        sizes=sizes,
        strategies=["ranked", "contiguous"],
        n_windows=4,
        window=64,
        n_prompt=16,
    )


@pytest.fixture(scope="module")
def files(
    profile: Profile, plan: Plan, curve: Curve, domains: list[Domain], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A file of each kind, the evaluation by the command."""
    from moeshard.cli import main

    folder = tmp_path_factory.mktemp("sources")
    found = {name: folder / name for name in ("p.npz", "plan.json", "eval.json", "curve.json")}
    profile.save(found["p.npz"])
    plan.write(found["plan.json"])
    curve.save(found["curve.json"])
    texts: list[str | Path] = []
    for domain in domains:
        (folder / f"{domain.name}.txt").write_text(domain.texts[0], encoding="utf-8")
        texts += ["--text", folder / f"{domain.name}.txt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["moeshard", *map(str, _evaluate(found, texts))])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return found


def _evaluate(found: dict[str, Path], texts: list[str | Path]) -> list[str | Path]:
    size = ["--windows", "4", "--window", "64", "--prompt", "16", "--generate", "1", "-n", "16", "--threads", "1"]
    return ["evaluate", "tinymoe", "--plan", found["plan.json"], *texts, *size, "-o", found["eval.json"]]


@pytest.fixture(scope="module")
def evaluation(files: dict[str, Path]) -> Evaluation:
    return read_evaluation(files["eval.json"])


@pytest.fixture(scope="module")
def page(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of everything; the files in an order of their own."""
    path = tmp_path_factory.mktemp("report") / "all.html"
    write_report(read_sources([files[name] for name in ("curve.json", "eval.json", "p.npz", "plan.json")]), path)
    return path


def table(page: Path, name: str) -> list[dict[str, str]]:
    with open(folder_of(page) / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Reader(HTMLParser):
    """Collects what a page holds; fails where elements are not closed in order."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            assert not key.startswith("on")
            if key == "id":
                self.ids.append(str(value))
            if key.split(":")[-1] in ("href", "src", "srcset", "data", "action"):
                self.links.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Reader(text)
    plain = re.sub(r"base64,[A-Za-z0-9+/=\s]*", "", text)
    assert "http" not in plain and "@import" not in plain and "script" not in found.tags
    assert len(found.ids) == len(set(found.ids))
    for link in found.links:
        if link.startswith("#"):
            assert link[1:] in found.ids
        else:
            assert link.startswith(("data:image/png;base64,", "data:text/csv;base64,"))
    for reference in re.findall(r"url\(([^)]*)\)", text):
        assert reference.startswith("#") and reference[1:] in found.ids
    assert found.tags.count("section") == len(FIGURES) + 1
    assert "svg" in found.tags and "var(--ink)" in text


def saved(page: Path) -> dict[str, bytes]:
    """What the links of a page save, by name."""
    links = re.findall(r'<a download="([^"]*)" href="data:[^;]*;base64,([^"]*)"', page.read_text(encoding="utf-8"))
    assert len({name for name, _ in links}) == len(links)
    return {name: base64.b64decode(data) for name, data in links}


def test_a_page_that_is_sent_alone_holds_pictures_and_numbers(page: Path) -> None:
    assert saved(page) == {path.name: path.read_bytes() for path in folder_of(page).iterdir()}


def test_the_page_fits_a_phone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    style = text[text.index("<style>") : text.index("</style>")]
    # Pictures shrink to whatever width there is, and tables scroll by themselves.
    assert "figure svg { display: block; width: 100%; height: auto }" in style and "min-width" not in style
    for element in re.findall(r"<svg[^>]*>", text):
        assert "viewBox" in element and "width=" not in element
    # At 358 points, of 390 with the page's edges, letters of 8 points are no smaller than 7 pixels.
    for width in re.findall(r'<svg[^>]*viewBox="0 0 ([0-9.]+)', text):
        assert 8 * 358 / float(width) > 7
    tables, wide = text.count("<table"), text.count('<div class="wide"><table')
    assert tables == wide > 0


def test_colours_can_be_read(page: Path) -> None:
    """By the formula of WCAG 2, here written out."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    text = page.read_text(encoding="utf-8")
    light, dark, _ = (
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", own)) for own in re.findall(r":root {(.*?)}", text)
    )
    assert set(light) == set(dark) == set(PALETTE)
    for setting in (light, dark):
        for name in set(PALETTE) - {*GROUNDS, *LINES}:
            for ground in GROUNDS:
                low, high = sorted((luminance(setting[name]), luminance(setting[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)
                assert contrast(setting[name], setting[ground]) == pytest.approx((high + 0.05) / (low + 0.05))
    # On any colour of a cell, and of the letters in the pictures none is of another colour.
    for parts in product(np.linspace(0, 1, 9), repeat=3):
        ground = "#" + "".join(f"{round(255 * part):02x}" for part in parts)
        assert contrast(readable_on(*parts), ground) >= 4.5
    known = {"#000000", "#ffffff", "none", *(f"var(--{name})" for name in PALETTE)}
    for letters in re.findall(r"<text[^>]*>", text):
        fill = re.search(r"fill: ([^;\"]+)", letters)
        # Without one it is black, in a bright cell.
        assert fill is None or fill[1] in known, letters


def test_the_verdict_comes_first(page: Path, evaluation: Evaluation, files: dict[str, Path], tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.index('class="verdict"') < text.index("<svg")
    first = summary(read_sources([files[name] for name in ("plan.json", "eval.json")]))[0]
    change = 100 * (evaluation.placed.ratio - 1)
    assert first.startswith("3 nodes with 50% and 25% of the experts each") and f"perplexity {change:+.0f}%" in first
    alone = Scores(1, (1, 1), np.log(1.16), (np.log(1.12), np.log(1.2)), Agreement(0, (0, 0), 0, 0.8, (0.8, 0.8)))
    plan = moeshard.read_plan(files["plan.json"])
    one = replace(plan, nodes=[replace(plan.nodes[0], facts={"memory": {"total": 5 << 29}})])
    one.extra["whole_memory"] = 5 << 30
    lost = replace(evaluation, groups=evaluation.groups[:1], placed=alone, loops=None)
    assert summary(Sources(plan=one, evaluation=lost))[:1] == [
        "One node with 50% of the experts (2.5 GiB of memory, 50% of the whole model's 5.0 GiB): perplexity +16% "
        "(95% interval: +12% to +20%); for 80% of tokens the likeliest one is the whole model's."
    ]
    nothing = replace(alone, excess=0.01, excess_ci=(-0.02, 0.04))
    assert (
        "no difference that this much text could show"
        in summary(Sources(plan=one, evaluation=replace(lost, placed=nothing)))[0]
    )
    said = summary(read_sources([files["p.npz"], files["plan.json"]]))
    assert any("not measured yet" in sentence for sentence in said) and "Experts differ" in said[-1]
    assert summary(read_sources([files["curve.json"]]))[0].startswith("One node with 50% of the experts (64 of 128")
    told = replace(lost, settings=replace(lost.settings, likeness=Likeness(["mail"])))
    assert "Mind: experts were chosen by text 'mail' too" in " ".join(summary(Sources(evaluation=told)))


def test_where_it_comes_from_is_told(cli: Cli, files: dict[str, Path], page: Path, tmp_path: Path) -> None:
    text = Reader(page.read_text(encoding="utf-8")).text
    document = json.loads(files["eval.json"].read_text())
    assert document["made"]["moeshard"] == moeshard.__version__
    assert document["made"]["command"].startswith("moeshard evaluate tinymoe --plan")
    minute = document["made"]["date"][:16].replace("T", " ")
    for word in (minute, document["made"]["command"], str(files["eval.json"]), moeshard.__version__):
        assert word in text
    for digest in document["settings"]["texts"].values():
        assert digest[:12] in text
    assert "not recorded" in text, "the plan was made by no command"
    # By the commands that make them, everything is.
    assert cli("analyze", "tinymoe", "-n", 512, "--window", 64, "-o", tmp_path / "p.npz", "--threads", 1).code == 0
    plan = ("plan", "tinymoe", "--profile", tmp_path / "p.npz", "--groups", 2, "--keep", 64, "-o", tmp_path / "pl.json")
    assert cli(*plan).code == 0
    assert cli("report", tmp_path / "p.npz", tmp_path / "pl.json", "-o", tmp_path / "r.html").code == 0
    text = Reader((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "not recorded" not in text and "moeshard analyze tinymoe -n 512" in text and "tinymoe" in text
    assert "of the whole model's" in text


def test_what_is_interrupted_leaves_nothing_in_the_way(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = read_sources([files["plan.json"]])
    monkeypatch.setattr("moeshard.report.writing.write_page", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        write_report(sources, tmp_path / "r.html")
    monkeypatch.undo()
    (tmp_path / "r.html").mkdir()
    with pytest.raises(MoeshardError):
        write_report(sources, tmp_path / "r.html", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    (tmp_path / "r.html").rmdir()
    write_report(sources, tmp_path / "r.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r_files"]


def test_every_figure_has_picture_and_numbers(page: Path, profile: Profile) -> None:
    names = {path.name for path in folder_of(page).iterdir()}
    pictures = {f"{name}.png" for name in FIGURES} | {f"heatmap-{i + 1}.png" for i in range(len(profile.domains))}
    assert names == pictures | {f"{name}.csv" for name in FIGURES}
    for name in pictures:
        assert (folder_of(page) / name).read_bytes().startswith(b"\x89PNG\r\n")
    found = Reader(page.read_text(encoding="utf-8"))
    assert set(found.ids) >= FIGURES


def brute_shares(profile: Profile, what: str, domains: list[int]) -> np.ndarray:
    values, shape = getattr(profile, what), (profile.layers.size, profile.n_expert)
    total = np.zeros(shape)
    for index in domains:
        tokens = sum(int(n) for n, own in zip(profile.n_tokens, profile.domain, strict=True) if own == index)
        for row, own in enumerate(profile.domain):
            if own == index:
                total += values[row].astype(float) / tokens
    return total / total.sum(axis=1, keepdims=True)


def test_the_heat_map_is_that_of_the_profile(page: Path, profile: Profile) -> None:
    rows = table(page, "heatmap")
    columns = {"share": [0, 1, 2]} | {f"share {name}": [index] for index, name in enumerate(profile.domains)}
    for column, chosen in columns.items():
        found = np.array([float(row[column]) for row in rows]).reshape(profile.layers.size, profile.n_expert)
        np.testing.assert_allclose(found, brute_shares(profile, "saliency", chosen), rtol=1e-5)
    places = list(product(profile.layers.tolist(), range(profile.n_expert)))
    assert [(int(row["layer"]), int(row["expert"])) for row in rows] == places
    assert all(0 <= float(row["standard_error"]) < 1 for row in rows)


def test_concentration_is_that_of_the_profile(page: Path, profile: Profile) -> None:
    rows, share = table(page, "concentration"), brute_shares(profile, "mass", [0, 1, 2])
    assert [row["layer"] for row in rows] == [*map(str, profile.layers), "summed over ids"]
    for row, own in zip(rows, [*share, share.mean(axis=0)], strict=True):
        for top in (1, 7, profile.n_expert // 4, profile.n_expert):
            np.testing.assert_allclose(float(row[f"top {top}"]), sorted(own)[::-1][:top] @ np.ones(top), rtol=1e-5)
    size = 32
    own = np.sort(share, axis=1)[:, -size:].sum(axis=1)
    text = Reader(page.read_text(encoding="utf-8")).text
    assert f"The {size} experts of most mass in a layer carry {own.mean():.0%} of it on average" in text
    assert "expert 5 of one layer and expert 5 of another are unrelated" in text


def test_super_experts_are_shown(profile: Profile, tmp_path: Path) -> None:
    loud = replace(profile, peak=profile.peak.copy())
    loud.peak[0, 1, 7] = 25 * np.median(profile.peak.max(axis=0)[1])
    write_report(Sources(loud), tmp_path / "r.html")
    rows = table(tmp_path / "r.html", "super-experts")
    found = [row for row in rows if row["super"] == "1"]
    assert [(row["layer"], row["expert"]) for row in found] == [(str(profile.layers[1]), "7")]
    peak = loud.peak.max(axis=0)
    for row in rows:
        layer, expert = profile.layers.tolist().index(int(row["layer"])), int(row["expert"])
        np.testing.assert_allclose(float(row["times_median"]), peak[layer, expert] / np.median(peak[layer]), rtol=1e-5)
    assert f"7 of layer {profile.layers[1]}" in Reader((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_nodes_are_those_of_the_plan(page: Path, profile: Profile, plan: Plan) -> None:
    keeps = {node.name: node.keep[profile.layers] for node in plan.nodes}
    best = []
    for row in table(page, "captured"):
        share = brute_shares(profile, "saliency", [profile.domains.index(row["domain"])])
        wanted = {name: (share * keep).sum(axis=1).mean() for name, keep in keeps.items()}
        np.testing.assert_allclose(float(row["captured"]), wanted[row["node"]], rtol=1e-5)
        if row["best"] == "1":
            best.append(row["domain"])
            assert row["node"] == max(wanted, key=lambda name: wanted[name])
    assert best == profile.domains
    for row in table(page, "overlap"):
        one, other = keeps[row["node"]], keeps[row["other"]]
        wanted_share = np.mean([(a & b).sum() / a.sum() for a, b in zip(one, other, strict=True)])
        np.testing.assert_allclose(float(row["share_of_node"]), wanted_share)


def test_the_keep_curve_has_its_intervals(page: Path, profile: Profile, plan: Plan) -> None:
    rows = table(page, "keep-fraction")
    share = np.sort(brute_shares(profile, "saliency", [0, 1, 2]), axis=1)[:, ::-1]
    points = [row for row in rows if row["experts"] == "best per layer"]
    for row in points:
        wanted = share[:, : int(row["keep"])].sum(axis=1).mean()
        np.testing.assert_allclose(float(row["captured"]), wanted, rtol=1e-5)
        assert float(row["low"]) <= float(row["high"])
        assert abs((float(row["low"]) + float(row["high"])) / 2 - wanted) < 0.1
    assert float(points[0]["high"]) - float(points[0]["low"]) > 0.001
    assert int(points[-1]["keep"]) == profile.n_expert
    nodes = {row["experts"]: row for row in rows if row["experts"] != "best per layer"}
    for node in plan.nodes:
        np.testing.assert_allclose(float(nodes[node.name]["captured"]), captured(profile, node.keep))
        np.testing.assert_allclose(float(nodes[node.name]["fraction"]), node.keep[profile.layers].mean())


def test_losses_are_those_of_the_evaluation(page: Path, files: dict[str, Path], curve: Curve) -> None:
    document = json.loads(files["eval.json"].read_text())
    groups = {group["name"]: group for group in document["groups"]}
    for row in table(page, "losses"):
        own = groups[row["node"]]["domains"][row["domain"]]
        assert [float(row[key]) for key in ("nll", "excess", "low", "high")] == [
            *(own["nll"], own["excess"], *own["excess_ci"])
        ]
        least = min(group["domains"][row["domain"]]["excess"] for group in groups.values())
        assert (row["best"] == "1") == (own["excess"] == least)
    ways = {"full model": "full", "oracle": "oracle", "as placed": "placed", "hashed": "hashed"}
    for row in table(page, "comparison"):
        own = document[ways[row["way"]]] if row["way"] in ways else groups[row["way"]]
        assert [float(row[key]) for key in ("nll", "excess", "low", "high")] == [
            *(own["nll"], own["excess"], *own["excess_ci"])
        ]
    rates = {"full model": document["generation"]["full"], "as placed": document["generation"]["placed"]}
    rates |= {group["name"]: group for group in document["generation"]["groups"]}
    found = {row["way"]: row for row in table(page, "loops")}
    assert set(found) == set(rates)
    for name, row in found.items():
        assert [float(row[key]) for key in ("rate", "low", "high", "answers")] == [
            *(rates[name]["rate"], *rates[name]["ci"], rates[name]["n"])
        ]
    points = [row for row in table(page, "keep-fraction-loss") if row["experts"] in curve.strategies]
    measured = [(name, point) for name, own in curve.strategies.items() for point in own]
    for row, (name, point) in zip(points, measured, strict=True):
        assert (row["experts"], int(row["keep"])) == (name, point.keep)
        assert float(row["excess"]) == point.scores.excess and float(row["nll"]) == point.scores.nll
        assert (float(row["low"]), float(row["high"])) == point.scores.excess_ci
    placed = next(row for row in table(page, "keep-fraction-loss") if row["experts"] == "as placed")
    assert float(placed["excess"]) == document["placed"]["excess"]


def test_text_that_the_plan_was_made_from_is_told(evaluation: Evaluation) -> None:
    assert "Mind:" not in " ".join(comparison(evaluation).says)
    likeness = Likeness(["mail"], {"code": 0.41}, ["de"], ["chat"])
    told = replace(evaluation, settings=replace(evaluation.settings, likeness=likeness))
    assert len(likeness.sentences()) == 4
    for sentence in likeness.sentences():
        assert f"Mind: {sentence}." in comparison(told).says


def test_any_of_the_files_will_do(files: dict[str, Path], tmp_path: Path) -> None:
    wanted = {
        "p.npz": {"keep-fraction", "heatmap", "concentration", "super-experts"},
        "plan.json": {"overlap"},
        "eval.json": {"comparison", "losses", "loops"},
        "curve.json": {"keep-fraction-loss"},
    }
    for name, names in wanted.items():
        assert {figure.name for figure in figures(read_sources([files[name]]))} == names
        write_report(read_sources([files[name]]), tmp_path / f"{name}.html")
        Reader((tmp_path / f"{name}.html").read_text(encoding="utf-8"))


def synthetic(n_layer: int, n_expert: int, n_node: int, n_domain: int, name: str = "d") -> Sources:
    rng = np.random.default_rng(0)
    model = ModelIdentity(name, name, "0" * 64, n_layer + 1, n_expert, list(range(1, n_layer + 1)))
    n_seq, shape = 4 * n_domain, (n_layer, n_expert)
    saliency = rng.gamma(0.5, size=(n_seq, *shape)).astype(np.float32)
    profile = Profile(
        model=model,
        domains=[f"{name} {index}" for index in range(n_domain)],
        layers=np.array(model.moe_layers, dtype=np.int32),
        domain=np.repeat(np.arange(n_domain, dtype=np.int32), 4),
        n_tokens=np.full(n_seq, 64, dtype=np.int32),
        count=saliency.astype(np.int32),
        mass=saliency,
        saliency=saliency,
        energy=saliency**2,
        entropy=np.ones((n_seq, n_layer), dtype=np.float32),
        peak=np.ones((n_domain, *shape), dtype=np.float32),
        together=np.zeros((n_domain, *shape, n_expert), dtype=np.int32),
        cosaliency=np.zeros((n_domain, *shape, n_expert), dtype=np.float32),
    )
    keeps = choose_experts(profile, [max(1, n_expert // max(2, n_node))] * n_node, "snake")
    nodes = [PlanNode(f"node-{index}", keep) for index, keep in enumerate(keeps)]
    return Sources(profile, Plan(nodes, "snake", {}, model))


@pytest.mark.parametrize(
    ("n_layer", "n_expert", "n_node", "n_domain"), [(1, 8, 1, 1), (61, 96, 16, 2), (2, 384, 2, 20)]
)
def test_models_of_all_sizes(n_layer: int, n_expert: int, n_node: int, n_domain: int, tmp_path: Path) -> None:
    made = write_report(synthetic(n_layer, n_expert, n_node, n_domain), tmp_path / "r.html")
    assert {figure.name for figure in made} == FIGURES - {"comparison", "losses", "loops", "keep-fraction-loss"} - (
        {"overlap"} if n_node == 1 else set()
    )
    Reader((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert len(table(tmp_path / "r.html", "heatmap")) == n_layer * n_expert
    assert (tmp_path / "r.html").stat().st_size < 4 << 20


def test_a_layer_without_traffic_is_drawn_too(tmp_path: Path) -> None:
    sources = synthetic(3, 8, 2, 2)
    assert sources.profile is not None
    for what in ("saliency", "mass", "peak", "count"):
        getattr(sources.profile, what)[:, 1] = 0
    write_report(sources, tmp_path / "r.html")
    assert "nan" not in (folder_of(tmp_path / "r.html") / "heatmap.csv").read_text()


def test_monotonous_traffic_is_drawn_too(model: moeshard.Model, tmp_path: Path) -> None:
    """Of which half of the experts see nothing, and one sequence says nothing of others."""
    profile = analyze(model, [Domain("a", ("aaaaaaaaaaaaaaaa " * 20,))])
    assert profile.n_tokens.size == 1
    write_report(Sources(profile), tmp_path / "r.html")
    for path in (tmp_path / "r.html", *folder_of(tmp_path / "r.html").glob("*.csv")):
        assert not re.search(r"\b(nan|inf)", path.read_text(encoding="utf-8"))
    assert "± unknown" in Reader((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_names_from_files_stay_text(evaluation: Evaluation, tmp_path: Path) -> None:
    sources = synthetic(2, 16, 2, 3, NASTY)
    assert sources.profile is not None and sources.plan is not None
    groups = [replace(group, name=f"{NASTY}{index}") for index, group in enumerate(evaluation.groups)]
    named = replace(evaluation, groups=groups, probe=next(iter(evaluation.probes)))
    write_report(replace(sources, evaluation=named), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    found = Reader(text)
    assert "script" not in found.tags and "<script" not in text
    assert NASTY in found.text
    assert len(found.ids) == len(set(found.ids))
    assert table(tmp_path / "r.html", "captured")[0]["domain"] == f"{NASTY} 0"


def test_bad_files_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MoeshardError, match="nothing to report on"):
        read_sources([])
    document = json.loads(files["eval.json"].read_text())
    plan = json.loads(files["plan.json"].read_text())
    bad = tmp_path / "bad.json"
    for text, message in (
        ("", "bad.json.*not JSON"),
        ("[]", "bad.json.*expected an object"),
        ("{}", "bad.json.*no profile, plan, evaluation or curve"),
        ('{"moeshard_evaluation": 99}', "bad.json.*version 99"),
        ('{"moeshard_curve": 1}', "bad.json.*strategies"),
        ('{"moeshard_plan": 1}', "bad.json.*model"),
        (json.dumps({**document, "oracle": {}}), r"bad.json.*oracle\.nll"),
        (json.dumps({**document, "groups": [{"name": 3}]}), r"bad.json.*groups\[0\]"),
    ):
        bad.write_text(text)
        with pytest.raises(MoeshardError, match=message):
            read_sources([files["p.npz"], bad])
    (tmp_path / "bad.npz").write_bytes(files["p.npz"].read_bytes()[:-100])
    with pytest.raises(MoeshardError, match=r"bad\.npz.*not a profile, or it is damaged"):
        read_sources([tmp_path / "bad.npz"])
    for name in ("none.npz", "."):
        with pytest.raises(MoeshardError, match=re.escape(str(tmp_path / name))):
            read_sources([tmp_path / name])
    with pytest.raises(MoeshardError, match="both a plan"):
        read_sources([files["plan.json"], files["p.npz"], files["plan.json"]])
    bad.write_text(json.dumps({**plan, "model": {**plan["model"], "fingerprint": "other"}}))
    with pytest.raises(MoeshardError, match=r"one\s+model"):
        read_sources([files["p.npz"], bad])
    bad.write_text(json.dumps({**plan, "nodes": plan["nodes"][:2]}))
    with pytest.raises(MoeshardError, match="plan that was evaluated"):
        read_sources([files["eval.json"], bad])


def test_command_line(
    cli: Cli, files: dict[str, Path], profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.html"
    done = cli("report", files["plan.json"], files["p.npz"], "-o", out)
    assert done.code == 0 and done.out.strip() == str(out) and "6 figures" in done.err
    before = out.read_bytes()
    done = cli("report", files["p.npz"], "-o", out)
    assert done.code == 1 and "--force" in done.err and out.read_bytes() == before
    assert cli("report", files["p.npz"], "-o", out, "--force").code == 0 and out.read_bytes() != before
    out.unlink()
    assert "r_files" in cli("report", files["p.npz"], "-o", out).err
    assert cli("report", files["p.npz"], "-o", tmp_path / "no" / "r.html").code == 1
    # A plan that says nothing of what its single node captures leaves nothing to show.
    Plan([PlanNode("one", np.ones((profile.model.n_layer, profile.n_expert), bool))], "all", {}, profile.model).write(
        tmp_path / "one.json"
    )
    done = cli("report", tmp_path / "one.json", "-o", tmp_path / "one.html")
    assert done.code == 1 and "nothing to show" in done.err and not (tmp_path / "one.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("report", files["p.npz"], "-o", tmp_path / "q.html")
    assert done.code == 1 and "moeshard[report]" in done.err and not folder_of(tmp_path / "q.html").exists()
