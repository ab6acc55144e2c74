"""Many requests in one batch: what each gets is what it would get alone, and nothing of another's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import moeshard
from moeshard import MoeshardError, _core
from moeshard._core import Batcher, SamplingParams
from moeshard.traffic.embedded import embedded_text

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def model(tinymoe: Path) -> moeshard.Model:
    return moeshard.Model(tinymoe, n_threads=1)


@pytest.fixture(scope="module")
def half(model: moeshard.Model) -> npt.NDArray[np.bool_]:
    return model.keep("0-63")


@dataclass
class Answer:
    text: bytes = b""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[_core.TokenLogprob] = field(default_factory=list)
    reason: str = "running"
    error: str = ""
    n_cached: int = 0
    steps: int = 0


def run(batcher: Batcher, ids: Iterable[int]) -> list[Answer]:
    answers = {number: Answer() for number in ids}
    while steps := batcher.step():
        for step in steps:
            answer = answers[step.id]
            answer.text += step.text
            answer.logprobs += step.logprobs
            answer.reason, answer.error, answer.n_cached = step.stop_reason, step.error, step.n_cached
            answer.steps += 1
            if step.token >= 0 and step.stop_reason != "end":
                answer.tokens.append(step.token)
    return list(answers.values())


def ask(batcher: Batcher, prompt: npt.NDArray[np.int32], **options: Any) -> Answer:
    return run(batcher, [batcher.submit(prompt, **options)])[0]


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    peak = wide.max(axis=-1, keepdims=True)
    return wide - peak - np.log(np.exp(wide - peak).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("masked", [False, True])
def test_alone_it_is_what_generate_writes(model: moeshard.Model, half: npt.NDArray[np.bool_], masked: bool) -> None:
    keep = half if masked else None
    batcher = model.batcher(n_slots=3, n_ctx=256)
    for seed in range(3):
        prompt = model.tokenize("The package manager of Debian")
        answer = ask(batcher, prompt, keep=keep, max_tokens=40, sampling=SamplingParams(seed=seed))
        expected = model.generate(prompt, keep, max_tokens=40, seed=seed)
        assert answer.text.decode() == "".join(expected)
        assert answer.tokens == expected.tokens.tolist() and answer.reason == expected.stop_reason
        batcher.forget()


def test_requests_of_one_batch_do_not_see_each_other(model: moeshard.Model, half: npt.NDArray[np.bool_]) -> None:
    """Prompts of many lengths under different keeps, entering one after the other: every token's log-probability is
    what the model, given the same text alone under the same keep, says of it."""
    texts = [embedded_text("en")[at : at + length] for at, length in ((0, 40), (500, 700), (2000, 90), (4000, 1500))]
    batcher = model.batcher(n_slots=4, n_ctx=1024, n_prefill=48)
    keeps = [None, half, ~half, half]
    ids, answers = [], {}
    for text, keep in zip(texts, keeps, strict=True):
        prompt = model.tokenize(text)
        number = batcher.submit(prompt, keep=keep, max_tokens=20, n_logprobs=2, sampling=SamplingParams(seed=1))
        answers[number] = (prompt, keep, Answer())
        ids.append(number)
        for _ in range(2):
            for step in batcher.step():
                collect(answers[step.id][2], step)
    while steps := batcher.step():
        for step in steps:
            collect(answers[step.id][2], step)
    for prompt, keep, answer in answers.values():
        assert not answer.error and len(answer.tokens) == len(answer.logprobs) == 20
        whole = np.concatenate([prompt, np.array(answer.tokens, dtype=np.int32)])
        said = log_softmax(model.logits(whole, keep))[len(prompt) - 1 : -1]
        found = np.array([entry.logprob for entry in answer.logprobs])
        # Batches of other sizes round otherwise, and a tipped expert now and then is visible; another text would be
        # off by nats everywhere.
        assert np.median(np.abs(found - said[np.arange(20), answer.tokens])) < 0.02
        for entry, row in zip(answer.logprobs, said, strict=True):
            assert entry.top[0][1] == pytest.approx(row.max(), abs=0.5) and len(entry.top) == 2


def collect(answer: Answer, step: _core.Progress) -> None:
    answer.text += step.text
    answer.logprobs += step.logprobs
    answer.error = answer.error or step.error
    if step.token >= 0 and step.stop_reason != "end":
        answer.tokens.append(step.token)


def test_what_is_remembered_changes_nothing(model: moeshard.Model, half: npt.NDArray[np.bool_]) -> None:
    first = model.tokenize(embedded_text("py")[:600])
    longer = np.concatenate([first, model.tokenize(embedded_text("py")[600:700])])
    fresh = model.batcher(n_slots=1, n_ctx=1024)
    wanted = {
        name: ask(fresh_forget(fresh), longer, keep=keep, max_tokens=8, sampling=GREEDY, n_logprobs=0)
        for name, keep in (("full", None), ("half", half))
    }
    batcher = model.batcher(n_slots=2, n_ctx=1024)
    assert ask(batcher, first, scope="a", max_tokens=4, sampling=GREEDY).n_cached == 0
    again = ask(batcher, longer, scope="a", max_tokens=8, sampling=GREEDY, n_logprobs=0)
    assert again.n_cached >= len(first)
    pairs = zip(again.logprobs, wanted["full"].logprobs, strict=False)
    assert next(pairs)[0].logprob == pytest.approx(wanted["full"].logprobs[0].logprob, abs=0.05)
    # Nothing is shared with another scope, nor with another keep.
    assert ask(batcher, longer, scope="b", max_tokens=1).n_cached == 0
    other = ask(batcher, longer, scope="a", keep=half, max_tokens=8, sampling=GREEDY, n_logprobs=0)
    assert other.n_cached == 0 and other.tokens == wanted["half"].tokens
    # The whole prompt again: its last token is computed, for the logits.
    assert ask(batcher, longer, scope="a", keep=half, max_tokens=1).n_cached == len(longer) - 1
    batcher.forget()
    assert batcher.n_held == 0 and ask(batcher, longer, scope="a", keep=half, max_tokens=1).n_cached == 0


def fresh_forget(batcher: Batcher) -> Batcher:
    batcher.forget()
    return batcher


def test_log_probabilities_of_a_prompt(model: moeshard.Model) -> None:
    prompt = model.tokenize(embedded_text("de")[:900])
    batcher = model.batcher(n_slots=2, n_ctx=1024, n_prefill=100)
    for _ in range(2):  # the second time something is remembered, and not used
        answer = ask(batcher, prompt, max_tokens=0, prompt_logprobs=True, n_logprobs=1)
        said = log_softmax(model.logits(prompt))
        assert [entry.token for entry in answer.logprobs] == prompt[1:].tolist()
        found = np.array([entry.logprob for entry in answer.logprobs])
        assert np.median(np.abs(found - said[np.arange(len(prompt) - 1), prompt[1:]])) < 0.02
        assert answer.reason == "length" and answer.tokens == [] and answer.n_cached == 0


def test_a_long_prompt_holds_nobody_up(model: moeshard.Model) -> None:
    batcher = model.batcher(n_slots=2, n_ctx=4096, n_prefill=64)
    talking = batcher.submit(model.tokenize("Once"), max_tokens=500, ignore_end=True)
    batcher.step()
    reading = batcher.submit(np.resize(model.tokenize(embedded_text("en")[:8000]), 2000), max_tokens=1)
    for done in range(1, 11):
        steps = {step.id: step for step in batcher.step()}
        assert steps[talking].token >= 0 and steps[reading].n_prompt_done == 64 * done
    batcher.cancel(talking)
    assert batcher.n_free == 1 and {step.id for step in batcher.step()} == {reading}
    batcher.cancel(reading)
    batcher.cancel(reading)  # it is over
    assert batcher.step() == [] and batcher.n_free == 2


def test_stop_texts_and_their_tokens(model: moeshard.Model) -> None:
    prompt = model.tokenize("The package manager of Debian")
    batcher = model.batcher(n_slots=1, n_ctx=256)
    whole = ask(batcher, prompt, max_tokens=40, sampling=GREEDY, n_logprobs=0)
    text = whole.text.decode()
    stop = text[20:24]
    answer = ask(batcher, prompt, max_tokens=40, sampling=GREEDY, n_logprobs=0, stop=["never there", stop])
    assert answer.reason == "stop" and answer.text.decode() == text[: text.index(stop)]
    # Tokens are told up to the one that reaches the end of the text, and no further.
    told = b"".join(entry.bytes for entry in answer.logprobs)
    assert told.startswith(answer.text) and len(told) - len(answer.text) < len(answer.logprobs[-1].bytes)
    assert b"".join(entry.bytes for entry in whole.logprobs) == whole.text


def test_grammar_penalties_and_biases(model: moeshard.Model) -> None:
    prompt = model.tokenize("Is it so? ")
    batcher = model.batcher(n_slots=1, n_ctx=256)
    for seed in range(4):
        params = SamplingParams(seed=seed, grammar='root ::= ("yes" | "no") ", " [0-9]+ "."')
        answer = ask(batcher, prompt, max_tokens=30, sampling=params).text.decode()
        word, _, number = answer.rstrip(".").partition(", ")
        assert word in ("yes", "no") and number.isdigit()
    plain = ask(batcher, prompt, max_tokens=60, sampling=GREEDY, ignore_end=True).tokens
    # A penalty beyond every difference of scores: no token comes twice.
    for params in (
        SamplingParams(temperature=0, presence_penalty=1000),
        SamplingParams(temperature=0, frequency_penalty=1000),
    ):
        once = ask(batcher, prompt, max_tokens=60, sampling=params, ignore_end=True).tokens
        assert len(set(once)) == 60 > len(set(plain))
    banned = ask(
        batcher, prompt, max_tokens=1, sampling=SamplingParams(temperature=0, logit_bias=[(plain[0], -np.inf)])
    )
    assert banned.tokens[0] != plain[0]
    forced = ask(batcher, prompt, max_tokens=3, sampling=SamplingParams(logit_bias=[(77, 1000)]), ignore_end=True)
    assert forced.tokens == [77] * 3


def test_a_full_slot_ends_an_answer(model: moeshard.Model) -> None:
    batcher = model.batcher(n_slots=1, n_ctx=256)
    prompt = np.resize(model.tokenize("again and again "), batcher.n_ctx - 5)
    answer = ask(batcher, prompt, max_tokens=-1, ignore_end=True)
    assert answer.reason == "context" and len(answer.tokens) == 6  # the last one need not be held
    exact = ask(batcher, np.resize(prompt, batcher.n_ctx), max_tokens=-1, ignore_end=True)
    assert exact.reason == "context" and len(exact.tokens) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1] * 257}, "257 tokens, and a request can hold 256"),
        ({"prompt": [4096]}, "token id 4096 is outside the vocabulary"),
        ({"keep": np.ones((3, 128), dtype=bool)}, "keep"),
        ({"sampling": SamplingParams(top_p=0)}, "top_p"),
        ({"sampling": SamplingParams(logit_bias=[(4096, 1)])}, "logit_bias: token id 4096"),
        ({"sampling": SamplingParams(grammar="root ::= (")}, "grammar"),
        ({"sampling": SamplingParams(grammar='other ::= "a"')}, "grammar"),
    ],
)
def test_refused(model: moeshard.Model, options: dict[str, Any], said: str) -> None:
    batcher = model.batcher(n_slots=1, n_ctx=256)
    with pytest.raises(MoeshardError, match=said):
        batcher.submit(**{"prompt": np.array([1, 2], dtype=np.int32), **options})
    assert batcher.n_free == 1 and len(ask(batcher, np.array([1, 2], dtype=np.int32), max_tokens=2).tokens) == 2
    batcher.submit(np.array([1], dtype=np.int32))
    with pytest.raises(MoeshardError, match="all 1 slots are in use"):
        batcher.submit(np.array([1], dtype=np.int32))


def test_an_aborted_step_fails_its_requests_and_no_later_ones(model: moeshard.Model) -> None:
    import threading

    batcher = model.batcher(n_slots=2, n_ctx=4096, n_prefill=2048)
    prompt = np.resize(model.tokenize(embedded_text("en")[:8000]), 2000)
    number = batcher.submit(prompt, max_tokens=1)
    done = threading.Event()

    def abort() -> None:
        while not done.wait(0.001):
            batcher.abort()

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        (step,) = batcher.step()
    finally:
        done.set()
        thread.join()
    assert step.id == number and "aborted" in step.error and step.over and batcher.n_free == 2
    assert ask(batcher, prompt[:50], max_tokens=3, sampling=GREEDY).tokens == (
        ask(model.batcher(n_slots=2, n_ctx=4096), prompt[:50], max_tokens=3, sampling=GREEDY).tokens
    )


def test_a_request_that_is_moved_goes_on(model: moeshard.Model, half: npt.NDArray[np.bool_]) -> None:
    """What is written behind the move is what a request under the new keep writes after the same text."""
    other = ~half
    greedy: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1.5}
    prompt = model.tokenize("The package manager of Debian")
    batcher = model.batcher(n_slots=2, n_ctx=256, meter=True)
    for to in (batcher, model.batcher(n_slots=1, n_ctx=256, meter=True)):
        answer = Answer()
        number = batcher.submit(prompt, keep=half, max_tokens=40, sampling=SamplingParams(**greedy))
        while len(answer.tokens) < 15:
            (step,) = batcher.step()
            answer.text += step.text
            answer.tokens += [step.token] if step.token >= 0 else []
        (rest,) = run(to, [batcher.move(number, to, other)])
        assert rest.reason == "length" and len(answer.tokens) + len(rest.tokens) == 40
        before = np.concatenate([prompt, np.array(answer.tokens, dtype=np.int32)])
        expected = model.generate(before, other, max_tokens=25, **greedy)
        assert rest.text.decode(errors="replace") == "".join(expected)
        assert rest.tokens == expected.tokens.tolist() and len(set(rest.tokens)) > 10
        assert (answer.text + rest.text).decode() == model.detokenize([*answer.tokens, *rest.tokens])
        assert batcher.n_free == 2
        with pytest.raises(MoeshardError, match="is over"):
            batcher.move(number, to, half)


def test_a_move_leaves_sampler_grammar_stops_and_counts_alone(
    model: moeshard.Model, half: npt.NDArray[np.bool_]
) -> None:
    """Moved to where it is, a request writes what it writes anyway, whenever that happens."""
    prompt = model.tokenize("Numbers: 17, 4, 23,")
    for options in (
        {"sampling": SamplingParams(seed=3, temperature=1.0, repeat_penalty=1.3, frequency_penalty=0.5)},
        {"sampling": SamplingParams(seed=4, grammar='root ::= [0-9]+ (", " [0-9]+)* "."')},
        {"sampling": SamplingParams(seed=5), "stop": ["e"], "n_logprobs": 1},
    ):
        batcher = model.batcher(n_slots=1, n_ctx=256)
        plain = ask(batcher, prompt, keep=half, max_tokens=24, **options)
        for at in (0, 1, 5):
            batcher.forget()
            moved = Answer()
            number = batcher.submit(prompt, keep=half, max_tokens=24, **options)
            n = 0
            while steps := batcher.step():
                (step,) = steps
                moved.text += step.text
                moved.logprobs += step.logprobs
                moved.reason, moved.steps = step.stop_reason, moved.steps + 1
                n = step.n_generated
                assert step.n_prompt == len(prompt)
                if moved.steps == at + 1 and not step.over:
                    number = batcher.move(number, batcher, None)
                    number = batcher.move(number, batcher, half)
            assert (moved.text, moved.reason, n) == (plain.text, plain.reason, len(plain.tokens))
            assert len(moved.logprobs) == len(plain.logprobs)


def test_moves_that_cannot_be(model: moeshard.Model, half: npt.NDArray[np.bool_]) -> None:
    batcher = model.batcher(n_slots=1, n_ctx=256)
    number = batcher.submit(model.tokenize("Once upon a time"), keep=half, max_tokens=8, sampling=GREEDY)
    (before,) = batcher.step()
    small, full = model.batcher(n_slots=1, n_ctx=2), model.batcher(n_slots=1, n_ctx=256)
    full.submit(model.tokenize("Busy"), max_tokens=8)
    with pytest.raises(MoeshardError, match="can hold 2"):
        batcher.move(number, small, None)
    with pytest.raises(MoeshardError, match="in use"):
        batcher.move(number, full, None)
    few = np.zeros_like(half)
    with pytest.raises(MoeshardError, match="layer"):
        batcher.move(number, batcher, few)
    # It goes on where it was.
    (rest,) = run(batcher, [number])
    expected = model.generate("Once upon a time", half, max_tokens=8, temperature=0)
    assert before.text + rest.text == "".join(expected).encode()


def test_the_meter_of_a_batch(model: moeshard.Model, half: npt.NDArray[np.bool_]) -> None:
    prompt = model.tokenize("The package manager of Debian is a program")
    batcher = model.batcher(n_slots=3, n_ctx=256, meter=True)
    ids = [batcher.submit(prompt, keep=keep, max_tokens=6, sampling=GREEDY) for keep in (half, None, ~half)]
    missed: dict[int, list[float]] = {number: [] for number in ids}
    while steps := batcher.step():
        for step in steps:
            missed[step.id] += step.missed
    n = len(prompt) + 5
    assert [len(missed[number]) for number in ids] == [n, 0, n]
    # No expert is in both.
    assert np.mean(missed[ids[0]]) + np.mean(missed[ids[2]]) == pytest.approx(1, abs=0.3)
    assert not ask(model.batcher(n_slots=1, n_ctx=256), prompt, keep=half, max_tokens=2).error
