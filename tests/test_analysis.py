"""The analyzer against brute force. Models whose routing is known: test_known_routing.py."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli

import moeshard
from moeshard import MoeshardError
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile, read_profile
from moeshard.profile.statistics import (
    SUPER_HITS,
    captured_curve,
    concentration,
    mean_entropy,
    peak_ratios,
    share_errors,
    shares,
    summed_concentration,
    super_experts,
    tops,
    verdict,
)
from moeshard.traffic.domains import Domain, read_texts
from moeshard.traffic.embedded import embedded_domains
from moeshard.traffic.windows import sequences

WINDOW = 64
HALF = 2**-11 + 2**-16
"""How far float16 rounds, beside what sums in float32 do."""


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def domains() -> list[Domain]:
    texts = {name: moeshard.embedded_text(name)[:6000] for name in ("en", "py")}
    return [Domain("en", (texts["en"][:3000], texts["en"][3000:])), Domain("py", (texts["py"],))]


@pytest.fixture(scope="module")
def profile(model: moeshard.Model, domains: list[Domain]) -> Profile:
    return analyze(model, domains, window=WINDOW)


def brute_force(trace: moeshard.Trace, layer: int) -> dict[str, np.ndarray]:
    count, mass, saliency, energy, peak = np.zeros((5, 128))
    together, cosaliency = np.zeros((2, 128, 128))
    assert trace.norms is not None
    for ids, weights, norms in zip(trace.ids[layer], trace.weights[layer], trace.norms[layer], strict=True):
        for expert, weight, norm in zip(ids, weights, norms, strict=True):
            count[expert] += 1
            mass[expert] += weight
            contribution = float(weight) * float(norm)
            saliency[expert] += contribution
            energy[expert] += contribution**2
            peak[expert] = max(peak[expert], norm)
            for other, other_weight, other_norm in zip(ids, weights, norms, strict=True):
                together[expert, other] += 1
                cosaliency[expert, other] += contribution * float(other_weight) * float(other_norm)
    sums = {"count": count, "mass": mass, "saliency": saliency, "energy": energy, "peak": peak}
    return {**sums, "together": together, "cosaliency": cosaliency}


def test_equals_brute_force(
    model: moeshard.Model, domains: list[Domain], profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One sequence at a time, as the trace below: in larger batches matrix products round otherwise, and here and there
    # a near tie falls the other way.
    monkeypatch.setattr("moeshard.profile.measure.BATCH_TOKENS", WINDOW)
    found = analyze(model, domains, window=WINDOW)
    for index, domain in enumerate(domains):
        rows = np.flatnonzero(found.domain == index)
        peaks, pairs, products = np.zeros((5, 128)), np.zeros((5, 128, 128)), np.zeros((5, 128, 128))
        pieces = sequences(model, domain, WINDOW)
        assert found.n_tokens[rows].tolist() == [len(piece) for piece in pieces]
        for row, tokens in zip(rows, pieces, strict=True):
            trace = model.trace(tokens, probs=True, norms=True)
            assert trace.probs is not None
            for layer in range(5):
                wanted = brute_force(trace, layer)
                np.testing.assert_array_equal(found.count[row, layer], wanted["count"])
                for name, error in (("mass", HALF), ("saliency", HALF), ("energy", 2 * HALF)):
                    least = wanted[name].max() * 2**-24
                    np.testing.assert_allclose(getattr(found, name)[row, layer], wanted[name], rtol=error, atol=least)
                p = trace.probs[layer].astype(np.float64)
                np.testing.assert_allclose(found.entropy[row, layer], -(p * np.log(p)).sum(), rtol=1e-4)
                peaks[layer] = np.maximum(peaks[layer], wanted["peak"])
                pairs[layer] += wanted["together"]
                products[layer] += wanted["cosaliency"]
        np.testing.assert_array_equal(found.together[index], pairs)
        squares = np.einsum("mee->me", products)
        units = np.sqrt(squares[:, :, None] * squares[:, None, :])
        assert (np.abs(found.cosaliency[index] - products) <= HALF * products + 2**-25 * units).all()
        np.testing.assert_allclose(np.einsum("mee->me", found.cosaliency[index]), squares, rtol=1e-4)
        np.testing.assert_allclose(squares, found.energy[rows].sum(axis=0), rtol=2 * HALF)
        np.testing.assert_allclose(found.peak[index], peaks, rtol=1e-6)
    assert found.count.sum() == profile.count.sum()
    for name in ("mass", "saliency"):
        alone, batched = found.total(name), profile.total(name)
        assert np.abs(alone - batched).sum() < 0.02 * alone.sum()


def test_totals_count_domains_alike(profile: Profile) -> None:
    np.testing.assert_allclose(profile.total("mass").sum(axis=1), len(profile.domains), rtol=HALF)
    np.testing.assert_allclose(profile.total("count").sum(axis=1), 8 * len(profile.domains), rtol=1e-12)
    only = profile.total("saliency", ["py"])
    np.testing.assert_allclose(profile.total("saliency") - profile.total("saliency", ["en"]), only)
    with pytest.raises(MoeshardError, match="no domain 'xx'"):
        profile.total("mass", ["xx"])
    with pytest.raises(MoeshardError, match="saliency, mass, count, reap"):
        profile.ranking("size")
    reap = profile.ranking("reap")
    chosen = profile.total("count") > 0
    np.testing.assert_allclose(reap[chosen], (profile.total("saliency")[chosen] / profile.total("count")[chosen]))


def test_concentration_is_that_of_each_layer(profile: Profile) -> None:
    n_layer, n_expert = profile.layers.size, profile.n_expert
    assert tops(n_expert) == [1, 32, 48, 64, 96, 128] and tops(8) == [1, 2, 4, 6, 8] and tops(384)[-2:] == [96, 384]
    mass = np.zeros((n_layer, n_expert))
    entropy = np.zeros(n_layer)
    for index in range(len(profile.domains)):
        rows = profile.domain == index
        mass += profile.mass[rows].sum(axis=0) / profile.n_tokens[rows].sum() / len(profile.domains)
        entropy += profile.entropy[rows].sum(axis=0) / profile.n_tokens[rows].sum() / len(profile.domains)
    found = concentration(profile, [1, 5, n_expert])
    for row, values in enumerate(mass):
        wanted = [sum(sorted(values, reverse=True)[:top]) / values.sum() for top in (1, 5, n_expert)]
        np.testing.assert_allclose(found[row], wanted, rtol=1e-5)
    np.testing.assert_allclose(mean_entropy(profile), entropy, rtol=1e-5)
    # One list of ids for all layers holds no more than the sums over ids say, and less than a list for each layer.
    by_id = (mass / mass.sum(axis=1, keepdims=True)).mean(axis=0)
    ids = np.argsort(-by_id)[:32]
    held = (mass[:, ids].sum(axis=1) / mass.sum(axis=1)).mean()
    np.testing.assert_allclose(summed_concentration(profile, [32, n_expert]), [held, 1], rtol=1e-5)
    assert held < concentration(profile, [32]).mean() - 0.02


def test_super_experts_stand_out_in_their_layer(profile: Profile) -> None:
    assert not super_experts(profile).any()
    loud = Profile(**vars(profile))
    loud.peak = profile.peak.copy()
    loud.peak[0, 1, 7] = 11 * np.median(profile.peak.max(axis=0)[1])
    assert np.argwhere(super_experts(loud)).tolist() == [[1, 7]]


def test_experts_without_traffic_make_no_super_experts(model: moeshard.Model, cli: Cli, tmp_path: Path) -> None:
    """Monotonous text uses less than half of the experts: the median over all would be 0, and each "infx" of it."""
    text = "aaaaaaaaaaaaaaaa " * 60
    found = analyze(model, [Domain("a", (text,))], window=WINDOW)
    used = found.count.sum(axis=0) > 0
    assert used.mean() < 0.5 and (used.sum(axis=1) < 64).any()
    ratios = peak_ratios(found)
    assert np.isfinite(ratios).all() and (ratios[~used] == 0).all() and (ratios[used] > 0).all()
    assert not super_experts(found).any()
    (tmp_path / "a.txt").write_text(text)
    done = cli("analyze", "tinymoe", "--text", tmp_path / "a.txt", "-o", tmp_path / "a.npz", "--threads", 1)
    assert done.code == 0 and "No super experts" in done.out and "inf" not in done.out


def test_super_experts_are_seen_more_than_once(profile: Profile) -> None:
    loud = replace(profile, peak=profile.peak.copy(), count=profile.count.copy())
    loud.peak[0, 1, [7, 9]] = 20 * np.median(profile.peak.max(axis=0)[1])
    loud.count[:, 1, [7, 9]] = 0
    loud.count[0, 1, 7], loud.count[0, 1, 9] = SUPER_HITS, SUPER_HITS - 1
    assert np.argwhere(super_experts(loud)).tolist() == [[1, 7]]
    # Rare experts, whose outputs had no chance to be large, do not make the others look so.
    rare = replace(profile, peak=profile.peak.copy(), count=profile.count.copy())
    rare.count[:, 2, :100], rare.peak[:, 2, :100] = 0, 0
    rare.count[0, 2, :100], rare.peak[0, 2, :100] = 1, 1e-3
    assert not super_experts(rare).any()
    rare.count[:], rare.peak[:] = 0, 0
    assert (peak_ratios(rare) == 0).all()


def test_survives_a_file(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "p.npz")
    found = read_profile(tmp_path / "p.npz")
    assert (found.model, found.domains, found.facts) == (profile.model, profile.domains, profile.facts)
    for name in (
        "layers",
        "domain",
        "n_tokens",
        "count",
        "mass",
        "saliency",
        "energy",
        "entropy",
        "peak",
        "together",
        "cosaliency",
    ):
        np.testing.assert_array_equal(getattr(found, name), getattr(profile, name))
    ranking = moeshard.read_ranking(tmp_path / "p.npz", 5, 128, range(5))
    np.testing.assert_array_equal(ranking.scores, profile.ranking())
    with pytest.raises(MoeshardError, match="exists"):
        profile.save(tmp_path / "p.npz")


def test_damaged_profiles_are_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    profile.save(path)
    good = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)

    def with_head(place: list[str], value: object) -> np.ndarray:
        head = json.loads(str(arrays["head"]))
        within = head
        for key in place[:-1]:
            within = within[key]
        within[place[-1]] = value
        return np.array(json.dumps(head))

    for name, value in (
        ("count.0.z", arrays["count.0.z"][:-1]),
        ("count.1.z", np.frombuffer(zlib.compress(b"few"), np.uint8)),
        ("mass.0", arrays["mass.0"].astype(float)),
        ("mass.0", arrays["mass.0"][1:]),
        ("mass.1.z", np.frombuffer(zlib.compress(b"\x7c" * arrays["mass.0"].size), np.uint8)),
        ("mass_scale", arrays["mass_scale"] * np.nan),
        ("cells", arrays["cells"] | 1),
        ("cells", arrays["cells"][:, 1:]),
        ("correlation.0", arrays["correlation.0"][1:]),
        ("squares", arrays["squares"][:1]),
        ("entropy", np.full_like(arrays["entropy"], np.nan)),
        ("domain", arrays["domain"] + 7),
        ("layers", arrays["layers"][::-1]),
        ("head", np.array("{}")),
        ("head", np.array("no json")),
        ("head", with_head(["model", "n_expert"], "128")),
        ("head", with_head(["model", "moe_layers"], "01234")),
        ("head", with_head(["domains"], [0, 1])),
        ("head", with_head(["domains"], ["en", "en"])),
        ("head", with_head(["facts"], None)),
    ):
        np.savez(path, **{**arrays, name: value})
        with pytest.raises(MoeshardError, match=r"p\.npz"):
            read_profile(path)
    for data in (b"", b"Some text.", good[: len(good) // 2], b"PK\3\4" + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(MoeshardError, match=r"p\.npz.*damaged"):
            read_profile(path)
    with pytest.raises(MoeshardError, match=r"none\.npz"):
        read_profile(tmp_path / "none.npz")
    path.write_bytes(good)
    assert read_profile(path).domains == profile.domains


class Stop(Exception):
    pass


def test_an_interrupted_analysis_goes_on(
    model: moeshard.Model, domains: list[Domain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeshard.profile.measure.SAVE_SECONDS", -1.0)
    monkeypatch.setattr("moeshard.profile.measure.SAVE_TIMES", 0)  # however long writing takes here
    monkeypatch.setattr("moeshard.profile.measure.BATCH_TOKENS", 4 * WINDOW)
    part = tmp_path / "part.npz"
    whole = analyze(model, domains, window=WINDOW)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        analyze(model, domains, window=WINDOW, save_to=part, progress=stop)
    left = read_profile(part)
    assert 0 < (left.n_tokens > 0).sum() < left.n_tokens.size
    spent = left.facts["seconds"]
    assert len({int(d) for d in left.domain[left.n_tokens > 0]}) == 2, "domains take turns"
    seen: list[int] = []
    found = analyze(
        model, domains, window=WINDOW, save_to=part, resume=True, progress=lambda done, total: seen.append(done)
    )
    assert seen[0] == left.n_tokens.sum()
    assert 0 < spent < found.facts["seconds"]
    assert part.exists(), "until the profile is saved"
    for name in ("n_tokens", "count", "mass", "saliency", "energy", "entropy", "peak", "together", "cosaliency"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))

    left.save(part, force=True)
    with pytest.raises(MoeshardError, match="other options"):
        analyze(model, domains[::-1], window=WINDOW, save_to=part, resume=True)


def test_a_file_that_cannot_be_written_is_found_before_the_work(
    model: moeshard.Model, domains: list[Domain], tmp_path: Path
) -> None:
    seen: list[int] = []
    for path in (tmp_path / "nowhere" / "part.npz", Path(model.path)):
        with pytest.raises(MoeshardError, match=re.escape(str(path))):
            analyze(model, domains, window=WINDOW, save_to=path, progress=lambda done, total: seen.append(done))
    assert not seen


def test_continuations_of_the_model_are_measured_too(model: moeshard.Model, domains: list[Domain]) -> None:
    plain = analyze(model, domains, window=WINDOW, n_tokens=4 * WINDOW)
    more = analyze(model, domains, window=WINDOW, n_tokens=4 * WINDOW, n_generate=2)
    assert more.n_tokens.size == plain.n_tokens.size + 4
    assert (more.n_tokens[-4:] > WINDOW // 2).all()
    again = analyze(model, domains, window=WINDOW, n_tokens=4 * WINDOW, n_generate=2)
    np.testing.assert_array_equal(more.count, again.count)


def test_a_sample_of_nothing_is_not_ranked(profile: Profile) -> None:
    found = verdict(profile)
    assert found.n_tokens == profile.n_tokens.sum() and 0 < found.agreement <= 1
    # Experts chosen by chance: whatever order this one sample has, the next has another.
    rng = np.random.default_rng(3)
    noise = Profile(**vars(profile))
    noise.saliency = rng.poisson(0.3, profile.saliency.shape).astype(np.float32)
    found = verdict(noise)
    assert found.is_flat or found.is_too_small
    assert found.agreement < 0.4
    even = Profile(**vars(profile))
    even.saliency = rng.poisson(50, profile.saliency.shape).astype(np.float32)
    assert verdict(even).is_flat and "flat" in str(verdict(even))


def test_standard_errors_are_those_of_other_samples(profile: Profile) -> None:
    """Drawn from a known distribution, the shares of many samples scatter as the bootstrap of one says."""
    rng = np.random.default_rng(1)
    rates = rng.gamma(2.0, 1.0, 128)
    samples = []
    for _ in range(40):
        sample = Profile(**vars(profile))
        sample.saliency = rng.poisson(rates, profile.saliency.shape).astype(np.float32)
        sample.n_tokens = np.full_like(profile.n_tokens, 64)
        samples.append(sample)
    scatter = np.std([shares(sample) for sample in samples], axis=0)
    said = np.mean([share_errors(sample) for sample in samples[:5]], axis=0)
    assert 0.8 < said.mean() / scatter.mean() < 1.25


def few_sequences(profile: Profile, number: int) -> Profile:
    """The first sequences of each domain alone."""
    rows = np.concatenate([np.flatnonzero(profile.domain == index)[:number] for index in range(len(profile.domains))])
    by_sequence = ("domain", "n_tokens", "count", "mass", "saliency", "energy", "entropy")
    return replace(profile, **{name: getattr(profile, name)[rows] for name in by_sequence})


def test_errors_of_a_single_sequence_are_unknown(profile: Profile, cli: Cli, tmp_path: Path) -> None:
    alone = few_sequences(profile, 1)
    assert np.isnan(share_errors(alone)).all()
    found = verdict(alone)
    assert found.is_too_small and not found.is_known and "unknown" in str(found) and "nan" not in str(found)
    assert np.isfinite(share_errors(few_sequences(profile, 2))).all()
    share, low, high = captured_curve(few_sequences(profile, 3), [32, 128])
    assert 0 < share[0] < share[1] == pytest.approx(1) and np.isnan([low, high]).all()
    assert np.isfinite(captured_curve(few_sequences(profile, 4), [32])).all()

    text = tmp_path / "short.txt"
    text.write_text(moeshard.embedded_text("en")[:300])
    arguments = ("analyze", "tinymoe", "-o", tmp_path / "p.npz", "--text", text, "--threads", 1)
    said = cli(*arguments).out
    assert "± unknown" in said and "± 0" not in said and "nan" not in said
    facts = json.loads(cli(*arguments, "--force", "--json").out)
    assert facts["most_salient"]["0"]["standard_error"] is None and facts["spread"] is None


def test_intervals_of_captured_shares_hold_the_truth(profile: Profile) -> None:
    """Of a known distribution of traffic, few sequences of a few domains."""
    rng = np.random.default_rng(8)
    rates = np.sort(rng.gamma(1.0, 1.0, (3, 1, 1, 16)), axis=3)[..., ::-1]
    truth = (rates.sum(axis=0) / rates.sum(axis=0).sum(axis=2, keepdims=True))[0, 0, :4].sum()
    held, trials = 0, 300
    for _ in range(trials):
        s, shape = 18, (18, 1, 16)
        # What a text needs varies from text to text.
        saliency = (np.repeat(rates, 6, axis=0)[:, 0] * rng.gamma(8, 1 / 8, shape)).astype(np.float32)
        sample = replace(
            profile,
            model=replace(profile.model, n_expert=16),
            domains=["a", "b", "c"],
            layers=profile.layers[:1],
            domain=np.repeat(np.arange(3, dtype=np.int32), 6),
            n_tokens=np.full(s, 64, dtype=np.int32),
            saliency=saliency,
        )
        _, low, high = captured_curve(sample, [4])[:, 0]
        held += low <= truth <= high
    assert held / trials > 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials)


def test_chats_end_where_they_end(model: moeshard.Model, tmp_path: Path) -> None:
    lines = [["user"], ["user", "assistant"]]
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "\n".join(json.dumps({"messages": [{"role": role, "content": "x"} for role in line]}) for line in lines)
    )
    (domain,) = read_texts([], [path], model=model, template="chatml")
    asked, answered = domain.texts
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n") and answered.endswith("assistant\nx<|im_end|>\n")


def test_bad_traffic_is_named(model: moeshard.Model, tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("Some text. " * 100)
    chat = tmp_path / "chat.jsonl"
    assert [(d.name, len(d.texts)) for d in read_texts([str(good), f"x={good}", f"x={good}"])] == [
        ("good", 1),
        ("x", 2),
    ]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for spec in ("empty.txt", "latin.txt", "nothing.txt"):
        with pytest.raises(MoeshardError, match=spec):
            read_texts([str(tmp_path / spec)])
    for line in ("{}", "[]", "x", '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"messages": 3}'):
        chat.write_text("\n" + line + "\n")
        with pytest.raises(MoeshardError, match="line 2"):
            read_texts([], [chat], model=model)
    chat.write_text('{"messages": [{"role": "user", "content": "Hello"}]}')
    with pytest.raises(MoeshardError, match="template"):
        read_texts([], [chat], model=model)
    with pytest.raises(MoeshardError, match="too little"):
        analyze(model, [Domain("tiny", ("x",))])
    with pytest.raises(MoeshardError, match="layer 5 routes nothing"):
        analyze(model, [Domain("x", ("text " * 100,))], layers=[5])
    with pytest.raises(MoeshardError, match="one name"):
        analyze(model, [Domain("x", ("text " * 100,))] * 2)
    with pytest.raises(MoeshardError, match="no text"):
        analyze(model, [])


def test_command_line(cli: Cli, tmp_path: Path) -> None:
    out, ranking = tmp_path / "p.npz", tmp_path / "r.csv"
    arguments = ("analyze", "tinymoe", "-o", out, "-n", 1024, "--window", 64, "--threads", 1)
    done = cli(*arguments, "--export-ranking", ranking, "--layers", "1-2")
    assert done.code == 0
    said = " ".join(done.out.split())
    assert "even" in said and "rank correlation" in said and " ± " in said and "super experts" in said
    assert "by id" in said and "nothing to do with each other" in said
    assert ranking.read_text().startswith("layer,expert,score\n1,0,")
    assert read_profile(out).layers.tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.npz", "r.csv"]
    assert "--force" in cli(*arguments).err
    facts = json.loads(cli(*arguments, "--force", "--json").out)
    assert set(facts["domains"]) == set(embedded_domains())
    assert set(facts["domains"].values()) == {1024}
    assert facts["concentration"]["0"][-1] == 1
    measured = read_profile(out)
    np.testing.assert_allclose(facts["summed_over_ids"], summed_concentration(measured, facts["tops"]))
    np.testing.assert_allclose(list(facts["entropy"].values()), mean_entropy(measured))
    best = facts["most_salient"]["1"]
    assert best["expert"] == shares(measured)[1].argmax()
    assert best["share"] == shares(measured)[1].max() and 0 < best["standard_error"] < best["share"]
    assert facts["super_experts"] == []

    text = tmp_path / "mine.txt"
    text.write_text(moeshard.embedded_text("fr")[:8000])
    facts = json.loads(cli("analyze", "tinymoe", "-o", tmp_path / "q.npz", "--text", text, "--json").out)
    assert list(facts["domains"]) == ["mine"]
    for options, message in (
        (("--micro", "-n", 5), "--micro"),
        (("--layers", "0", "--all-layers"), "contradict"),
        (("--layers", "0-5"), "the model has 5 layers, numbered from 0 to 4"),
        (("--text", "nothing.txt"), "nothing.txt"),
        (("--ranking", "luck"), "saliency, mass, count, reap"),
        (("--window", 100000), "trained on 512"),
        (("-o", tmp_path / "nowhere" / "no.npz"), "does not exist"),
    ):
        done = cli("analyze", "tinymoe", "-o", tmp_path / "no.npz", *options)
        assert done.code != 0 and message in done.err
    assert not list(tmp_path.glob("no.npz*"))


def test_what_an_interrupted_analysis_left_is_not_replaced_unsaid(cli: Cli, tmp_path: Path) -> None:
    left = tmp_path / "p.npz.partial"
    left.write_bytes(b"of another day")
    arguments = ("analyze", "tinymoe", "-o", tmp_path / "p.npz", "-n", 512, "--threads", 1)
    resumed = cli(*arguments, "--resume")
    assert resumed.code == 1 and str(left) in resumed.err
    done = cli(*arguments)
    assert done.code == 0 and "--resume" in done.err and not left.exists()


def test_samples_of_short_documents_are_as_large_as_asked(model: moeshard.Model) -> None:
    text = moeshard.embedded_text("en")
    chats = Domain("chats", tuple(text[at : at + 200] for at in range(0, 20000, 200)))
    assert sum(map(len, sequences(model, chats, WINDOW * 8, 1000))) == pytest.approx(1000, rel=0.1)
    assert [len(tokens) for tokens in sequences(model, Domain("long", (text,)), WINDOW, 30)] == [30]
    with pytest.raises(MoeshardError, match="no name before"):
        read_texts(["=mine.txt"])
