"""Degenerate loops: the signs on constructed answers and on real text, thresholds, intervals, and real answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moeshard
from moeshard import MoeshardError, _core
from moeshard.evaluation.loops import (
    Loops,
    Prompt,
    Signs,
    Thresholds,
    learn_thresholds,
    measure_loops,
    rate_of,
    signs_of,
)
from moeshard.placement.nodes import masked_nodes
from moeshard.runtime.answers import Request, Sampling, write_answers
from moeshard.traffic.embedded import embedded_domains, embedded_text


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


def test_signs_of_what_repeats_and_of_what_does_not() -> None:
    rng = np.random.default_rng(0)
    other = rng.permutation(4000)[:128]
    assert signs_of(other) == Signs(0, pytest.approx(1))
    stuck = signs_of(np.full(128, 7))
    assert stuck.repetition == pytest.approx(124 / 125) and stuck.entropy == 0
    # A loop of eight tokens: eight 4-grams are new, and eight tokens are as good as one in two of six bits.
    cycle = signs_of(np.resize(other[:8], 128))
    assert cycle.repetition == pytest.approx(1 - 8 / 125) and cycle.entropy == pytest.approx(0.5)
    # One that is longer than the tail repeats in the whole answer only; one that began late, in the tail only.
    long = signs_of(np.resize(other[:64], 128))
    assert long.repetition == pytest.approx(1 - 64 / 125) and long.entropy == pytest.approx(1)
    late = signs_of(np.concatenate([other[:64], np.full(64, 7)]))
    assert late.repetition == pytest.approx(60 / 61) and late.entropy == 0
    # Few tokens in no order: no repetition to speak of, but little entropy.
    few = signs_of(rng.integers(0, 20, 128))
    assert few.repetition < 0.1 and few.entropy < 0.75


@pytest.mark.parametrize("answer", [[], [3], [3, 3, 3]])
def test_answers_too_short_to_repeat(answer: list[int]) -> None:
    assert signs_of(np.array(answer, dtype=np.int32)).repetition == 0


def test_real_text_is_not_a_loop_and_loops_made_of_it_are(model: moeshard.Model) -> None:
    answers = []
    for domain in embedded_domains():
        tokens = model.tokenize(embedded_text(domain)[:40_000])
        answers += [tokens[at : at + 128] for at in range(0, len(tokens) - 128, 128)][:20]
    text = [signs_of(answer) for answer in answers]
    thresholds = learn_thresholds(text[::2])
    flagged = [thresholds.flags(signs) for signs in text[1::2]]
    assert np.mean(flagged) < 0.15
    # From the middle on, each repeats its last tokens, fewer or more of them.
    for period in (1, 5, 12):
        loops = [np.concatenate([answer[:48], np.resize(answer[48 - period : 48], 80)]) for answer in answers]
        found = [thresholds.flags(signs_of(loop)) for loop in loops]
        assert np.mean(found) > 0.9, period


def test_answers_go_beyond_thresholds_as_often_as_these_say() -> None:
    rng = np.random.default_rng(1)
    beyond = []
    for _ in range(400):
        signs = [Signs(*pair) for pair in rng.random((80, 2))]
        thresholds = learn_thresholds(signs[:79], 0.95)
        beyond.append((signs[79].repetition > thresholds.repetition, signs[79].entropy < thresholds.entropy))
    # Beyond the 4th of 79 is exactly 1 in 20; three standard errors are 0.033.
    assert np.abs(np.mean(beyond, axis=0) - 0.05).max() < 0.033
    few = [Signs(0.1, 0.9), Signs(0.3, 0.5), Signs(0.2, 0.7)]
    assert learn_thresholds(few) == Thresholds(0.3, 0.5)
    assert not any(learn_thresholds(few).flags(signs) for signs in few)
    assert learn_thresholds(few).flags(Signs(0.31, 0.9)) and learn_thresholds(few).flags(Signs(0, 0.49))
    with pytest.raises(MoeshardError, match="some answers"):
        learn_thresholds([])


@pytest.mark.parametrize(
    ("n_up", "n", "interval"),
    [(0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (5, 10, (0.2366, 0.7634)), (1, 100, (0.0018, 0.0545))],
)
def test_intervals_are_wilsons(n_up: int, n: int, interval: tuple[float, float]) -> None:
    rate = rate_of([True] * n_up + [False] * (n - n_up), 0.95)
    assert (rate.rate, rate.n) == (n_up / n, n) and rate.ci == pytest.approx(interval, abs=1e-4)
    assert 0 <= rate.ci[0] <= rate.rate <= rate.ci[1] <= 1


class TestSampling:
    CHANCES = (0.05, 0.5, 0.3, 0.15)

    def drawn(self, model: moeshard.Model, sampling: Sampling, n: int) -> np.ndarray:
        """Draw tokens 0 to 3 by their chances, no other."""
        logits = np.full(model.n_vocab, -np.inf, dtype=np.float32)
        logits[:4] = np.log(self.CHANCES)
        sampler = _core.Sampler(model._native, sampling.params(seed=1))
        return np.array([sampler.sample(logits) for _ in range(n)])

    @pytest.mark.parametrize("temperature", [1, 0.5])
    def test_draws_by_probability(self, model: moeshard.Model, temperature: float) -> None:
        n = 4000
        drawn = self.drawn(model, Sampling(temperature, top_k=0, top_p=1, min_p=0), n)
        wanted = np.array(self.CHANCES) ** (1 / temperature)
        wanted /= wanted.sum()
        errors = np.sqrt(wanted * (1 - wanted) / n)
        assert (np.abs(np.bincount(drawn, minlength=4) / n - wanted) < 5 * errors).all()

    @pytest.mark.parametrize(
        ("sampling", "left"),
        [
            (Sampling(1, top_k=2, top_p=1, min_p=0), {1, 2}),
            (Sampling(1, top_k=0, top_p=0.45, min_p=0), {1}),
            (Sampling(1, top_k=0, top_p=0.6, min_p=0), {1, 2}),
            (Sampling(1, top_k=0, top_p=1, min_p=0.2), {1, 2, 3}),
            (Sampling(0), {1}),
        ],
    )
    def test_drops_the_unlikely(self, model: moeshard.Model, sampling: Sampling, left: set[int]) -> None:
        assert set(self.drawn(model, sampling, 200).tolist()) == left

    @pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": np.inf}, {"top_k": -1}, {"top_p": 0}])
    def test_refuses_what_means_nothing(self, wrong: dict[str, float]) -> None:
        with pytest.raises(MoeshardError, match="temperature"):
            Sampling(**wrong)  # type: ignore[arg-type]


class TestAnswers:
    def test_are_those_of_generate(self, model: moeshard.Model) -> None:
        half = model.keep(f"0-{model.n_expert // 2 - 1}")
        prompt = model.tokenize(embedded_text(embedded_domains()[0])[:200])
        # One at a time: a batch of another size rounds otherwise.
        for keep in (None, half):
            (answer,) = write_answers(model, [Request(prompt, 0, keep)], 24, sampling=Sampling(0))
            expected = model.generate(prompt, keep, max_tokens=24, temperature=0)
            list(expected)
            np.testing.assert_array_equal(answer, expected.tokens)

    def test_seeds_and_batches(self, model: moeshard.Model) -> None:
        prompt = model.tokenize("The ")
        requests = [Request(prompt, seed) for seed in (1, 2, 1)] + [Request(prompt, seed) for seed in range(17)]
        done: list[int] = []
        answers = write_answers(model, requests, 16, progress=done.append)
        assert [answer.size for answer in answers] == [16] * 20 and sum(done) == 20
        np.testing.assert_array_equal(answers[0], answers[2])
        assert (answers[0] != answers[1]).any()
        for answer, again in zip(answers, write_answers(model, requests, 16), strict=True):
            np.testing.assert_array_equal(answer, again)
        assert write_answers(model, [], 16) == []
        with pytest.raises(MoeshardError, match="prompt is empty"):
            write_answers(model, [Request(np.zeros(0, dtype=np.int32), 0)], 4)

    def test_end_where_the_model_ends_them(self, model: moeshard.Model, tmp_path: Path) -> None:
        prompts = [model.tokenize(embedded_text(domain)[:100]) for domain in embedded_domains()[:2]]
        requests = [Request(prompt, 0) for prompt in prompts]
        whole = write_answers(model, requests, 12, sampling=Sampling(0))
        end = int(whole[0][5])
        offset, size = moeshard.GGUFMap(model.path).parts[0].entry_ranges["tokenizer.ggml.eos_token_id"]
        data = bytearray(Path(model.path).read_bytes())
        data[offset + size - 4 : offset + size] = end.to_bytes(4, "little")
        file = tmp_path / "ends.gguf"
        file.write_bytes(data)
        ending = moeshard.Model(file, n_threads=1)
        assert ending.is_end(end)
        for answer, all_of_it in zip(write_answers(ending, requests, 12, sampling=Sampling(0)), whole, strict=True):
            ends = np.flatnonzero(all_of_it == end)
            np.testing.assert_array_equal(answer, all_of_it[: ends[0] if ends.size else 12])


@pytest.fixture(scope="module")
def prompts(model: moeshard.Model) -> list[Prompt]:
    found = []
    for name in embedded_domains()[:2]:
        tokens = model.tokenize(embedded_text(name)[:2000])
        found += [Prompt(name, tokens[at : at + 16], node) for at, node in ((0, 1), (100, 1), (200, 1))]
    return found


@pytest.fixture(scope="module")
def loops(model: moeshard.Model, prompts: list[Prompt]) -> Loops:
    fewest = model.keep(f"0-{model.n_expert_used - 1}")
    nodes = dict(zip(("all", "fewest"), masked_nodes(model, [model.keep("all"), fewest]), strict=True))
    done: list[tuple[int, int]] = []
    found = measure_loops(
        model, nodes, prompts, n_answers=6, n_tokens=64, seed=5, progress=lambda *step: done.append(step)
    )
    assert done[-1] == (48, 48) and len(done) == 3
    return found


class TestMeasuring:
    def test_counts(self, loops: Loops) -> None:
        assert loops.n == 6 and loops.tokens == 64 and loops.temperature == 0.8
        assert loops.seeds == [5, 6, 7, 8, 9, 10] and loops.threshold_seeds == [11, 12, 13, 14, 15, 16]
        assert loops.full.n == loops.placed.n == 12 and {rate.n for rate in loops.groups.values()} == {12}
        assert loops.false_alarms == loops.full.rate

    def test_all_sessions_on_one_node_loop_as_that_node_does(self, loops: Loops) -> None:
        assert loops.placed == loops.groups["fewest"]

    def test_a_broken_node_loops_more(self, loops: Loops) -> None:
        assert loops.groups["fewest"].rate > max(loops.full.rate, loops.groups["all"].rate)
        assert {example.node for example in loops.examples} >= {"fewest"} and len(loops.examples) <= 5
        assert all(example.domain in embedded_domains() and example.text for example in loops.examples)
