"""A few steps of real training: it learns, stops and resumes; routing statistics and masks are right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tinymoe import train as training
from tinymoe.config import CONFIGS, Config
from tinymoe.measure import most_salient, nll, overlap, profile, random_keep, set_keep, windows
from tinymoe.model import Model
from tinymoe.sources import DOMAINS, WEIGHTS
from tinymoe.team import Checkpoint
from tinymoe.train import Mixture, Options, learning_rate

TINY = Config("qwen3moe", vocab=64, width=32, layers=2, heads=2, kv_heads=1, experts=8, used=2)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Token files in which the next token is always the last one plus the domain's number."""
    (tmp_path / "train").mkdir()
    for i, domain in enumerate(DOMAINS):
        (np.arange(60_000) * (i + 1) % 64).astype(np.uint16).tofile(tmp_path / "train" / f"{domain}.bin")
    return tmp_path


def test_batches_follow_the_weights_and_workers_share_rows(corpus: Path) -> None:
    whole, halves = Mixture(corpus, 0), [Mixture(corpus, 0), Mixture(corpus, 0)]
    rows = whole.batch(256 * 200, 256, 0, 1)
    parts = [m.batch(256 * 200, 256, i, 2) for i, m in enumerate(halves)]
    assert torch.equal(rows[0::2], parts[0]) and torch.equal(rows[1::2], parts[1])
    step = (rows[:, 1] - rows[:, 0]) % 64 - 1
    for i, domain in enumerate(DOMAINS):
        assert abs(int((step == i).sum()) - 200 * WEIGHTS[domain]) <= 1


def test_windows_cover_a_pass_once(corpus: Path) -> None:
    source = Mixture(corpus, 0).windows["en"]
    count = len(source.tokens) // 256 - 1
    starts = {int(source.next(256)[0]) for _ in range(count)}
    assert len(source.order) >= count and len(set(source.order.tolist())) == len(source.order) and starts


def test_learning_rate_warms_up_stays_and_falls() -> None:
    o = Options("tinymoe", Path(), Path(), 1, warmup_steps=10, decay_share=0.5)
    assert learning_rate(0.0, 0, o) == pytest.approx(0.1)
    assert learning_rate(0.4, 100, o) == 1.0
    assert learning_rate(0.75, 100, o) == pytest.approx(0.5)
    assert learning_rate(1.0, 100, o) == 0.0


@pytest.mark.parametrize("workers", [1, 2])
def test_training_learns_and_resumes(corpus: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    monkeypatch.setattr(training, "CONFIGS", CONFIGS)
    out = corpus / "run"
    o = Options("tiny", corpus, out, 0.1, batch_tokens=1024, warmup_steps=5, workers=workers)
    training.train(o)
    first = Checkpoint(out / "checkpoint.pt").read()
    model = Model(TINY)
    model.load_state_dict(first["model"])
    rows = windows(torch.arange(600).remainder(64).tolist())
    assert first["step"] > 5
    assert nll(model, rows) < 0.8 * math.log(64)
    o.minutes = 0.15
    training.train(o)
    second = Checkpoint(out / "checkpoint.pt").read()
    assert second["step"] > first["step"] and second["seconds"] > first["seconds"]
    assert set(second["optimiser"]) == {n for n, _ in model.named_parameters()}
    assert (out / "stable.pt").exists()


def test_profile_counts_every_choice() -> None:
    torch.manual_seed(0)
    model = Model(TINY).eval()
    rows = windows(torch.randint(64, (257 * 3,)).tolist())
    p = profile(model, rows)
    torch.testing.assert_close(p.load.sum(1), torch.full((2,), 2.0))
    torch.testing.assert_close(p.mass.sum(1), torch.ones(2))
    assert float(p.entropy.max()) <= math.log(8) + 1e-6
    assert (p.saliency >= 0).all()


def test_dropped_experts_are_never_chosen() -> None:
    torch.manual_seed(0)
    model = Model(TINY).eval()
    keep = random_keep(2, 8, 3, seed=1)
    set_keep(model, keep)
    with torch.no_grad():
        model(torch.randint(64, (2, 50)))
    for i, router in enumerate(model.routers()):
        assert router.last is not None
        assert keep[i][router.last.index].all()
        torch.testing.assert_close(router.last.gate.sum(-1), torch.ones(100))


def test_overlap() -> None:
    scores = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    top = most_salient(scores, 2)
    assert top.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert overlap(top, top) == 1.0 and overlap(top, ~top) == 0.0
