"""The Python API on the embedded model."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import moeshard


@pytest.fixture(scope="module")
def model() -> moeshard.Model:
    return moeshard.Model(moeshard.embedded_model(), n_threads=1)  # so small a model gains nothing from more


@pytest.fixture(scope="module")
def tokens(model: moeshard.Model) -> np.ndarray:
    return model.tokenize(moeshard.embedded_text("en")[:2000])


def random_keep(model: moeshard.Model, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    keep = np.zeros((model.n_layer, model.n_expert), dtype=bool)
    for row in keep:
        row[rng.choice(model.n_expert, n, replace=False)] = True
    return keep


def assert_close(actual: np.ndarray, wanted: np.ndarray) -> None:
    """Another batch shape rounds differently, and in 8 bits that can flip a near-tied expert of single tokens."""
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).mean() < 0.02


def test_facts(model: moeshard.Model) -> None:
    assert model.arch == "qwen3moe"
    assert (model.n_expert, model.n_expert_used) == (128, 8)
    assert model.moe_layers == list(range(model.n_layer))
    file_bytes = Path(model.path).stat().st_size
    assert 0 < file_bytes - (model.trunk_bytes + model.expert_bytes) < 1 << 20  # the header is all that is left


def test_text_round_trip(model: moeshard.Model) -> None:
    text = "Ein Satz, déjà vu;\n\tdef f(x): return x**2  # 数\n"
    assert model.detokenize(model.tokenize(text)) == text


def test_logits_of_every_position(model: moeshard.Model, tokens: np.ndarray) -> None:
    logits = model.logits(tokens)
    assert logits.shape == (len(tokens), model.n_vocab)
    assert logits.dtype == np.float32
    assert_close(model.logits(tokens[:40]), logits[:40])  # causal: a prefix has the logits of its positions
    assert model.logits([]).shape == (0, model.n_vocab)


def test_keeping_every_expert_changes_nothing(model: moeshard.Model, tokens: np.ndarray) -> None:
    everything = np.ones((model.n_layer, model.n_expert), dtype=bool)
    assert np.array_equal(model.logits(tokens, everything), model.logits(tokens))


def test_a_mask_stays_with_its_call(model: moeshard.Model, tokens: np.ndarray) -> None:
    before = model.logits(tokens)
    masked = model.logits(tokens, "0-63")
    assert not np.array_equal(before, masked)
    assert np.array_equal(model.logits(tokens), before)
    with model.masked("0-63"):
        assert np.array_equal(model.logits(tokens), masked)
        with model.masked("64-127"):
            assert not np.array_equal(model.logits(tokens), masked)
        assert np.array_equal(model.logits(tokens), masked)
    assert np.array_equal(model.logits(tokens), before)


def test_a_mask_stays_with_its_thread(model: moeshard.Model, tokens: np.ndarray) -> None:
    before = model.logits(tokens)
    seen: list[np.ndarray] = []
    with model.masked("0-63"):
        other = threading.Thread(target=lambda: seen.append(model.logits(tokens)))
        other.start()
        other.join()
    assert np.array_equal(seen[0], before)


@pytest.mark.parametrize("layer", [0, 2])
def test_too_few_experts_names_the_layer(model: moeshard.Model, layer: int) -> None:
    keep = np.ones((model.n_layer, model.n_expert), dtype=bool)
    keep[layer, 7:] = False
    with pytest.raises(moeshard.MoeshardError, match=f"layer {layer} keeps 7 experts.* 8"):
        model.logits([1, 2, 3], keep)
    keep[layer, 7] = True
    assert np.isfinite(model.logits([1, 2, 3], keep)).all()


def test_changing_masks_rebuilds_no_graph(model: moeshard.Model) -> None:
    with model.session() as session:
        session.decode({0: [1]})
        session.decode({0: [2]})
        start = session.n_graph_reuses
        for step in range(20):
            session.set_keep(random_keep(model, 32, step) if step % 3 else None)
            session.decode({0: [step]})
        # The cache of keys and values grows in steps, and each of them is another graph.
        assert session.n_graph_reuses - start >= 19


def test_each_sequence_has_its_own_mask(model: moeshard.Model, tokens: np.ndarray) -> None:
    keeps = [None, random_keep(model, 64, 1), random_keep(model, 32, 2)]
    sequences = [tokens, tokens[:100], tokens[50:]]
    together = model.logits_batch(sequences, keeps)
    for sequence, keep, logits in zip(sequences, keeps, together, strict=True):
        assert_close(logits, model.logits(sequence, keep))


def test_trace_under_a_mask(model: moeshard.Model, tokens: np.ndarray) -> None:
    keep = random_keep(model, 32, 3)
    trace = model.trace(tokens, keep, probs=True, norms=True)
    assert trace.ids.shape == (len(model.moe_layers), len(tokens), model.n_expert_used)
    assert trace.probs is not None and trace.norms is not None
    for index, layer in enumerate(trace.layers):
        assert keep[layer][trace.ids[index]].all()
        assert (trace.probs[index][:, ~keep[layer]] == 0).all()
    np.testing.assert_allclose(trace.probs.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(trace.weights.sum(-1), 1, atol=1e-5)  # this architecture renormalises
    assert (trace.norms > 0).all()
    best = np.sort(np.argpartition(-trace.probs, model.n_expert_used, axis=-1)[..., : model.n_expert_used], axis=-1)
    assert np.array_equal(best, np.sort(trace.ids, axis=-1))


def test_trace_stream_equals_trace(model: moeshard.Model) -> None:
    tokens = np.tile(model.tokenize(moeshard.embedded_text("de")[:3000]), 2)
    small = moeshard.Model(moeshard.embedded_model(), n_ubatch=64, n_threads=1)
    chunks: list[moeshard.TraceChunk] = []
    small.trace_stream(tokens, chunks.append)
    assert max(len(chunk.pos) for chunk in chunks) == 64
    ids = np.concatenate([np.stack([layer.ids for layer in chunk.layers]) for chunk in chunks], axis=1)
    assert np.array_equal(ids, small.trace(tokens).ids)


def test_trace_sink_errors_come_through(model: moeshard.Model, tokens: np.ndarray) -> None:
    def sink(chunk: moeshard.TraceChunk) -> None:
        raise KeyError("mine")

    before = model.logits(tokens)
    with pytest.raises(KeyError, match="mine"):
        model.trace_stream(tokens, sink)
    assert np.array_equal(model.logits(tokens), before)


def test_greedy_generation_follows_the_logits(model: moeshard.Model) -> None:
    prompt = model.tokenize("The system administrator")
    answer = model.generate(prompt, temperature=0, max_tokens=12, ignore_end=True)
    text = "".join(answer)
    assert answer.stop_reason == "length"
    assert text == answer.text == model.detokenize(answer.tokens)
    for i, token in enumerate(answer.tokens):
        logits = model.logits(np.concatenate([prompt, answer.tokens[:i]]))[-1]
        assert logits[token] >= logits.max() - 1e-3


def test_seeds_repeat(model: moeshard.Model) -> None:
    def run(seed: int, **options: float) -> str:
        return "".join(model.generate("Le fichier", seed=seed, max_tokens=30, **options))  # type: ignore[arg-type]

    assert run(1) == run(1)
    assert len({run(seed, temperature=1.5) for seed in range(4)}) > 1


def test_stop_text_is_not_part_of_the_answer(model: moeshard.Model) -> None:
    whole = "".join(model.generate("The ", temperature=0, max_tokens=40))
    stop = whole[10:14]
    answer = model.generate("The ", temperature=0, max_tokens=40, stop=[stop])
    assert "".join(answer) == whole[: whole.index(stop)]
    assert answer.stop_reason == "stop"


def test_generation_ends_where_the_context_does(model: moeshard.Model) -> None:
    small = moeshard.Model(moeshard.embedded_model(), n_ctx=256, n_threads=1)
    answer = small.generate("The ", max_tokens=-1, ignore_end=True, seed=0)
    "".join(answer)
    assert answer.stop_reason == "context"
    assert len(answer.prompt_tokens) + len(answer.tokens) == 257  # the last one is drawn, not computed


def test_a_mask_holds_while_generating(model: moeshard.Model) -> None:
    keep = random_keep(model, 16, 5)
    answer = model.generate("The ", keep, max_tokens=20, seed=1, ignore_end=True)
    "".join(answer)
    seen = model.trace(np.concatenate([answer.prompt_tokens, answer.tokens]), keep)
    for index, layer in enumerate(seen.layers):
        assert keep[layer][seen.ids[index]].all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits([m.n_vocab]), "outside the vocabulary"),
        (lambda m: m.logits([-1]), "between 0 and"),
        (lambda m: m.logits([[1, 2]]), "one-dimensional"),
        (lambda m: m.logits([0.5]), "integers"),
        (lambda m: m.logits([1], np.ones((1, 1), dtype=bool)), r"\(5, 128\)"),
        (lambda m: m.generate([]), "empty"),
        (lambda m: m.generate("a", top_p=0), "top_p"),
        (lambda m: m.generate("a", min_p=2), "min_p"),
        (lambda m: m.generate("a", repeat_penalty=0), "repeat_penalty"),
        (lambda m: m.generate("a", temperature=float("nan")), "temperature"),
        (lambda m: m.logits_batch([[1]], [None, None]), "keeps"),
        (lambda m: m.session(n_seq=0), "n_seq"),
        (lambda m: m.session(n_seq=100_000), "sequences"),
        (lambda m: m.session().decode({3: [1]}), "sequence 3"),
        (lambda m: m.session().decode({0: [1]}, "some"), "outputs"),
        (lambda m: m.chat_prompt([{"role": "user", "content": "hi"}]), "chat template"),
    ],
)
def test_bad_calls_say_what_is_wrong(model: moeshard.Model, call: object, message: str) -> None:
    with pytest.raises(moeshard.MoeshardError, match=message):
        call(model)  # type: ignore[operator]


def test_chat_template_by_name(model: moeshard.Model) -> None:
    prompt = model.chat_prompt([{"role": "user", "content": "hi"}], template="chatml")
    whole = model.chat_prompt([{"role": "user", "content": "hi"}], template="chatml", answer=False)
    assert prompt == whole + "<|im_start|>assistant\n"
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_full_session_leaves_the_sequence_as_it_was(model: moeshard.Model) -> None:
    with model.session(n_ctx=256) as session:
        session.decode({0: [5] * (session.n_ctx - 1)})
        held = session.n_past()
        with pytest.raises(moeshard.MoeshardError, match="do not fit"):
            session.decode({0: [5, 5]})
        assert session.n_past() == held
        session.decode({0: [5]})


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "empty|truncated|short|magic"), (b"not a model", "GGUF|magic")],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(moeshard.MoeshardError, match=message) as error:
        moeshard.Model(path)
    assert str(path) in str(error.value)


def test_progress_can_stop_a_load() -> None:
    seen: list[float] = []

    def progress(fraction: float) -> bool:
        seen.append(fraction)
        return False

    with pytest.raises(moeshard.MoeshardError, match="could not be loaded"):
        moeshard.Model(moeshard.embedded_model(), progress=progress)
    assert seen

    def broken(fraction: float) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        moeshard.Model(moeshard.embedded_model(), progress=broken)


def test_every_public_name_is_there() -> None:
    assert all(getattr(moeshard, name) is not None for name in moeshard.__all__)
