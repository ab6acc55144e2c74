"""The analyzer on models whose routing is known, because their routers were written for the test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_copy import Values, rewritten

import moeshard
from moeshard import MoeshardError
from moeshard.placement.probes import saliency, saliency_held
from moeshard.planning.planner import choose_experts
from moeshard.planning.strategies import best
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile
from moeshard.profile.statistics import concentration, shares, verdict
from moeshard.traffic.domains import Domain

WINDOW = 64
Q8_0_BYTES = 34
"""Of a block: a scale in half precision, and 32 values."""


def random_routers(name: str, values: Values) -> Values | None:
    """Make experts that are all the same, and tokens and routers that point anywhere.

    What is left to differ between experts is how many of the model's few thousand tokens are theirs.
    """
    rng = np.random.default_rng(sum(map(ord, name)))
    if name.endswith("ffn_gate_inp.weight"):
        assert values.dtype == np.float32
        router = rng.standard_normal(values.shape)
        # Short rows: weights that are nearly even, whatever the token.
        return (0.25 * router / np.linalg.norm(router, axis=1, keepdims=True)).astype(np.float32)
    if name == "token_embd.weight":
        # Far larger than what layers add to it: those sums have directions that many tokens share.
        return (3000 * rng.standard_normal(values.shape)).astype(values.dtype)
    if name.endswith("ffn_norm.weight"):
        return np.ones_like(values)
    if name.endswith("_exps.weight"):
        same = np.broadcast_to(values[:1], values.shape).copy()
        if "down" in name:
            blocks = same.reshape(-1, Q8_0_BYTES)
            blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * np.float16(0.01)).view(np.uint8)
        return same
    return None


def even_text(model: moeshard.Model, n_tokens: int) -> str:
    """Write a text that has every token about as often as any other."""
    pieces = [model.detokenize([token]) for token in range(model.n_vocab)]
    alone = [piece for token, piece in enumerate(pieces) if model.tokenize(piece, special=False).tolist() == [token]]
    assert len(alone) > model.n_vocab / 2
    rng = np.random.default_rng(4)
    return "".join(rng.permutation(alone * -(-n_tokens // len(alone)))[:n_tokens])


def test_a_random_router_has_a_flat_profile(tinymoe: Path, tmp_path: Path) -> None:
    model = moeshard.Model(rewritten(tinymoe, tmp_path / "random.gguf", random_routers), n_threads=1)
    profile = analyze(model, [Domain("even", (even_text(model, 8000),))], window=WINDOW)
    found = verdict(profile)
    assert found.is_flat and "flat" in str(found)
    # None stands out. A reader that takes the engine's tensors for others finds a favourite: expert 0.
    for what in ("count", "mass", "saliency"):
        assert verdict(profile, what).is_flat
        assert shares(profile, what).max() < 2 / profile.n_expert
        quarter = concentration(profile, [profile.n_expert // 4], what)
        assert (quarter > 0.25).all() and (quarter < 0.32).all()


@pytest.fixture(scope="module")
def favourites(tinymoe: Path) -> Values:
    """Return int (n_layer, n_expert_used): other experts in every layer, ascending."""
    model = moeshard.Model(tinymoe, n_threads=1)
    rng = np.random.default_rng(9)
    rows = [rng.choice(model.n_expert, model.n_expert_used, replace=False) for _ in range(model.n_layer)]
    return np.sort(rows, axis=1)


@pytest.fixture(scope="module")
def biased(tinymoe: Path, favourites: Values, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Return the profile of a model whose routers prefer those experts by far."""

    def prefer(name: str, values: Values) -> Values | None:
        if not name.endswith("ffn_gate_inp.weight"):
            return None
        assert values.dtype == np.float32
        layer = int(name.split(".")[1])
        rng = np.random.default_rng(layer)
        router = 0.1 * rng.standard_normal(values.shape)
        # In pairs of opposite directions: one of each pair scores high, whatever the token.
        for one, other in favourites[layer].reshape(-1, 2):
            direction = 3 * rng.standard_normal(values.shape[1])
            router[one], router[other] = direction, -direction
        return router.astype(np.float32)

    path = rewritten(tinymoe, tmp_path_factory.mktemp("biased") / "biased.gguf", prefer)
    domains = [Domain(name, (moeshard.embedded_text(name)[:6000],)) for name in ("en", "py")]
    return analyze(moeshard.Model(path, n_threads=1), domains, window=WINDOW)


@pytest.mark.parametrize("what", ["mass", "saliency"])
def test_experts_that_a_router_prefers_are_ranked_first(biased: Profile, favourites: Values, what: str) -> None:
    size = favourites.shape[1]
    for domain in (None, *([name] for name in biased.domains)):
        first = np.argsort(-biased.ranking(what, domain), axis=1)[:, :size]
        np.testing.assert_array_equal(np.sort(first, axis=1), favourites)
    assert not verdict(biased, what).is_flat
    # Half of the favourites score high at a time; the other half of a token's experts are of no account.
    assert concentration(biased, [size], what).min() > 0.3 > 4 * size / biased.n_expert


def test_what_a_router_prefers_is_planned_for(biased: Profile, favourites: Values) -> None:
    wanted = np.zeros((len(favourites), biased.n_expert), dtype=bool)
    np.put_along_axis(wanted, favourites, True, axis=1)
    np.testing.assert_array_equal(choose_experts(biased, [favourites.shape[1]], "ranked")[0], wanted)
    np.testing.assert_array_equal(best(biased.total("mass"), favourites.shape[1]), wanted)
    for keep in choose_experts(biased, [biased.n_expert // 4] * 2, "shared-core"):
        assert (keep | ~wanted).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_named(tinymoe: Path, tmp_path: Path, value: float) -> None:
    """Two experts of one layer whose scales are not numbers; all that is computed after them is none either."""

    def spoil(name: str, values: Values) -> Values | None:
        if name != "blk.2.ffn_down_exps.weight":
            return None
        blocks = values.reshape(values.shape[0], -1, Q8_0_BYTES)
        for expert in (17, 70):
            blocks[expert, 5, :2] = np.array([value], dtype=np.float16).view(np.uint8)
        return values

    path = rewritten(tinymoe, tmp_path / "spoiled.gguf", spoil)
    model = moeshard.Model(path, n_threads=1)
    text = Domain("mail", (moeshard.embedded_text("en")[:8000],))
    with pytest.raises(MoeshardError, match=rf"{path}: layer 2, experts 17,70: .*not finite"):
        analyze(model, [text], window=WINDOW, save_to=tmp_path / "p.partial")
    prompt = model.tokenize(text.texts[0])[:200]
    for probe in (saliency, lambda *given: saliency_held(*given[:2], [given[2]])):
        with pytest.raises(MoeshardError, match=r"layer 2, experts? [17,0]+: .*not finite"):
            probe(model, [model.keep("0-63")], prompt)
