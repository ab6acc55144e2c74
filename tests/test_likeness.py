"""Whether text that is measured on is text that experts were chosen by, nearly that, or of another kind."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli

import moeshard
from moeshard import MoeshardError
from moeshard.evaluation.curve import measure_curve
from moeshard.evaluation.record import read_evaluation
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile
from moeshard.traffic.domains import Domain, embedded_traffic
from moeshard.traffic.embedded import embedded_domains, embedded_text
from moeshard.traffic.likeness import SKETCH, Likeness, likeness, likeness_from_json, sketch


def record(*domains: Domain) -> tuple[dict[str, str], dict[str, str]]:
    return {domain.name: domain.digest for domain in domains}, {domain.name: sketch(domain) for domain in domains}


def noise(seed: int, n_words: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(n_words))


@pytest.mark.parametrize("n_words", [300, 30_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_how_much_of_a_text_stands_in_another(n_words: int, share: float) -> None:
    """Also where the sketch holds all of a short text's hashes, and few of a long one's."""
    known, other = noise(1, n_words), noise(2, n_words)
    cut = int(share * len(known))
    # White space and letters' sizes do not matter, nor which of several known texts it is.
    mixed = Domain("mine", (known[:cut].replace(" ", " \n").upper() + other[cut:],))
    found = likeness([mixed], *record(Domain("first", (noise(3, 500),)), Domain("mine", (known,))))
    assert found.seen == [] and found.foreign == [] and found.missing == ["first"]
    if share < 0.2:
        assert found.near == {}
    else:
        # Of so many samples at least, by the length of the texts.
        spread = np.sqrt(share * (1 - share) / min(SKETCH, 1000))
        assert found.near["mine"] == pytest.approx(share, abs=4 * spread + 0.02)


def test_a_sketch_is_small_and_keeps_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Domain(str(n), (noise(n, n),)) for n in (3, 200, 200_000)]
    sizes = [len(base64.b64decode(sketch(text))) for text in texts]
    assert sizes[0] == 0 < sizes[1] <= sizes[2] == 6 * SKETCH
    # Files of profiles and plans hold it.
    assert sketch(Domain("x", ("The quick brown fox jumps over it.",))) == "LPioXzx5lluUEyRHt5fkABxw"
    whole = [sketch(text) for text in texts]
    monkeypatch.setattr("moeshard.traffic.likeness._PIECE", 1000)
    assert [sketch(text) for text in texts] == whole


def test_embedded_texts_of_a_kind_are_not_nearly_the_same() -> None:
    chosen = embedded_traffic("calibration")
    assert likeness(embedded_traffic("heldout"), *record(*chosen)) == Likeness()
    assert likeness(chosen, *record(*chosen)).seen == embedded_domains()
    edited = [Domain(text.name, (re.sub(r"\b(\w+)((?:\W+\w+){40})", r"changed\2", text.texts[0]),)) for text in chosen]
    found = likeness(edited, *record(*chosen))
    assert found.seen == [] and set(found.near) == set(embedded_domains())


def test_other_kinds_of_text_are_told() -> None:
    mine, code = Domain("mail", (noise(4, 400),)), Domain("code", (noise(5, 400),))
    heldout = embedded_traffic("heldout")
    found = likeness(heldout, *record(mine, code))
    assert found.foreign == embedded_domains() and found.missing == ["mail", "code"]
    said = " ".join(found.sentences())
    assert "not chosen for cpp" in said and "chosen for mail, code, of which nothing is measured" in said
    # The user's own text may be called like an embedded one; what else has its name is taken for its kind.
    own = Domain("en", (noise(6, 400),))
    assert likeness(heldout[2:3], *record(own)).foreign == ["en"]
    assert likeness([Domain("en", (noise(7, 400),))], *record(own)) == Likeness()
    assert likeness([Domain("mail", (noise(8, 400),)), own], *record(mine)) == Likeness(foreign=["en"])
    # Nothing is known of what says nothing, or nonsense.
    for texts in (None, {}, 3, "x"):
        assert likeness(heldout, texts, None) == Likeness()
    assert likeness([mine], {"mail": "0"}, {"mail": 3, "a": "ä", "b": "AAA", "c": "AAAA"}) == Likeness()


@pytest.fixture(scope="module")
def mail() -> Domain:
    return Domain("mail", (embedded_text("en", "calibration")[:12000],))


@pytest.fixture(scope="module")
def profile(tinymoe: Path, mail: Domain) -> Profile:
    return analyze(moeshard.Model(tinymoe, n_threads=1), [mail], n_tokens=1024, window=128)


def test_commands_say_so(cli: Cli, profile: Profile, mail: Domain, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.npz")
    made = ("plan", "tinymoe", "--profile", tmp_path / "p.npz", "--groups", 2, "--keep", 64)
    assert cli(*made, "-o", tmp_path / "plan.json").code == 0
    assert json.loads((tmp_path / "plan.json").read_text())["sketches"] == profile.facts["sketches"]
    quick = ("--windows", 4, "--window", 32, "--prompt", 8, "--threads", 1)
    evaluate = ("evaluate", "tinymoe", "--plan", tmp_path / "plan.json", *quick, "--generate", 0)
    curve = ("curve", "tinymoe", "--profile", tmp_path / "p.npz", "--keep", 64, *quick)
    near = tmp_path / "near.txt"
    near.write_text(mail.texts[0][:9000] + embedded_text("py")[:2000], encoding="utf-8")
    for command, out in ((evaluate, tmp_path / "e.json"), (curve, tmp_path / "c.json")):
        done = cli(*command, "-o", out)
        assert done.code == 0
        assert "warning: experts were not chosen for cpp, de," in done.err
        assert "warning: experts were chosen for mail, of which nothing is measured here" in done.err
        settings = json.loads(out.read_text())["settings"]
        assert settings["foreign"] == embedded_domains() and settings["missing"] == ["mail"]
        done = cli(*command, "--text", f"mail={near}", "-o", out, "--force")
        assert re.search(r"warning: about [78]\d% of text 'mail' stands in the text that experts", done.err)
        assert done.err.count("warning") == 1
        told = cli("report", out, "-o", tmp_path / "r.html", "--force")
        assert told.code == 0
        assert re.search(r"Mind: about \d+% of text &#x27;mail&#x27; stands", (tmp_path / "r.html").read_text())
    assert read_evaluation(tmp_path / "e.json").settings.likeness.near["mail"] > 0.7


def test_older_files_say_nothing_of_it(tinymoe: Path, profile: Profile, tmp_path: Path) -> None:
    assert likeness_from_json({"seen": ["a"]}, "settings") == Likeness(["a"])
    with pytest.raises(MoeshardError, match=r"settings\.near\.a: expected a number"):
        likeness_from_json({"near": {"a": "b"}}, "settings")
    old = Profile(**{**vars(profile), "facts": {}})
    plan = moeshard.make_plan(tinymoe, old, n_keep=[32])
    assert "sketches" not in plan.extra and plan.parameters["texts"] is None
    text = [Domain("en", (embedded_text("en")[:3000],))]
    found = measure_curve(
        moeshard.Model(tinymoe, n_threads=1), old, text, sizes=[64], n_windows=4, window=32, n_prompt=8
    )
    assert found.likeness == Likeness()
