"""`verify --logits`: sound shards pass, however rounding tips their routers, and wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from compare import Keep
from sharding import THREADS

import moeshard
from moeshard import GGUFMap, _core
from moeshard.cli.verify import lines
from moeshard.runtime.origin import Origin
from moeshard.shards.agreement import Comparison, Routers, Spread, Swap, compare
from moeshard.shards.jitter import jittered
from moeshard.shards.logits import LogitCheck, make_probes, selection_biases, summary
from moeshard.shards.runs import run

Make = Callable[..., Path]
SIBLINGS = Path(__file__).resolve().parents[2] / "benchmarks" / "tinymoe" / "models"


def random_keep(model: GGUFMap, n_keep: int, seed: int, *, same: bool = False) -> Keep:
    """Return `n_keep` random experts, of every layer others or `same`; of each expert group equally many."""
    layout = model.moe_layout()
    n_groups = max(layout.n_expert_groups, 1)
    rng = np.random.default_rng(seed)
    keep = np.zeros((layout.n_layer, n_groups, layout.n_expert // n_groups), dtype=bool)
    for row in keep:
        for group in row:
            group[rng.choice(group.size, n_keep // n_groups, replace=False)] = True
    if same:
        keep[:] = keep[0]
    return keep.reshape(layout.n_layer, -1)


def check(path: Path, keep: Keep, folder: Path) -> LogitCheck:
    shard = folder / "shard.gguf"
    moeshard.split(path, keep, shard, force=True)
    found = moeshard.verify(shard, path, logits=True, n_threads=THREADS).logits
    assert found is not None
    # The half whose sequences have no choice is compared to the end.
    assert found.n_compared >= found.n_tokens // 2 > 0
    assert found.agrees, found.problem
    return found


@pytest.mark.parametrize(
    ("name", "n_keep", "exact"),
    [
        ("deepseek2", 8, True),
        ("deepseek2", 5, False),
        ("arctic", 8, False),
        ("gemma4", 8, False),
        ("deepseek2+grouped-softmax", 12, False),
        ("deepseek4+hash", 7, False),
        ("rnd1", 8, False),
    ],
)
def test_shards_of_specimens(name: str, n_keep: int, exact: bool, make: Make, tmp_path: Path) -> None:
    found = check(make(name), random_keep(GGUFMap(make(name)), n_keep, n_keep, same=True), tmp_path)
    if exact:
        assert found.largest_difference == found.n_different == found.allowed == 0


def test_experts_that_share_a_chunk(make: Make, tmp_path: Path) -> None:
    path = make("grovemoe+chunks")
    layout = GGUFMap(path).moe_layout()
    keep = np.tile(np.arange(layout.n_expert) < 10, (layout.n_layer, 1))
    check(path, keep, tmp_path)


def test_near_ties_are_no_faults(tinymoe: Path, tmp_path: Path) -> None:
    """A router of 128 experts has so many near-ties that some are tipped in nearly every shard."""
    first = np.tile(np.arange(128) < 62, (5, 1))
    keeps = [first, *(random_keep(GGUFMap(tinymoe), 9 + 17 * seed, seed) for seed in range(4))]
    found = [check(tinymoe, keep, tmp_path) for keep in keeps]
    # Where logits are far apart, a token went elsewhere; where it did not, they are close.
    for each in found:
        assert each.largest_difference <= each.allowed
        assert each.largest_gap <= each.allowed_gap
        assert each.n_choices <= 5 * each.n_tokens


@pytest.mark.parametrize(("name", "sizes"), [("mixtral", (2, 3, 5)), ("sigmoid", (9, 50, 101))])
def test_shards_of_siblings(name: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    path = SIBLINGS / f"tinymoe-{name}-q8_0.gguf"
    for size in sizes:
        check(path, random_keep(GGUFMap(path), size, size), tmp_path)


def test_parts_of_a_shard(tinymoe: Path, tmp_path: Path) -> None:
    (shard,) = moeshard.split(tinymoe, "0-61", tmp_path / "shard.gguf", max_file_size=2 << 20)
    assert len(shard.paths) > 2
    found = moeshard.verify(shard.paths[1], tinymoe, logits=True, n_threads=THREADS).logits
    assert found is not None and found.agrees


def test_it_says_what_it_found(cli: Callable[..., object], tinymoe: Path, tmp_path: Path) -> None:
    moeshard.split(tinymoe, "0-61", tmp_path / "shard.gguf")
    done = cli("verify", tmp_path / "shard.gguf", "--source", "tinymoe", "--logits", "--threads", 1)
    text = " ".join(done.out.split())
    assert done.code == 0 and "choices of experts differ" in text
    assert "tokens whose experts are the same: those of the masked model" in text


# Faults.


@dataclass
class Bench:
    """A shard of half of tinymoe's experts, beside the masked model, of which files with faults are run."""

    path: Path
    keep: Keep

    def __post_init__(self) -> None:
        self.map = GGUFMap(self.path)
        (self.segments,) = _core.shard_segments(self.map, self.keep)
        self.infos = {info.name: info for info in self.segments.tensor_infos}
        layout = self.map.moe_layout()
        self.routers = Routers(layout, selection_biases(self.map, layout))
        sound = self.load(self.segments)
        self.probes = make_probes(sound, self.keep, layout)
        whole = moeshard.Model(self.path, n_threads=THREADS)
        self.whole = [run(whole, probe) for probe in self.probes]
        self.sound = [run(sound, probe) for probe in self.probes]
        changed = self.load(jittered(self.segments))
        pairs = zip(self.sound, (run(changed, probe) for probe in self.probes), strict=True)
        self.rounding = [compare(ours, theirs, self.routers) for ours, theirs in pairs]

    def load(self, segments: _core.SegmentList) -> moeshard.Model:
        return moeshard.Model(Origin(str(self.path), segments, self.keep), n_threads=THREADS)

    def judge(self, segments: _core.SegmentList) -> LogitCheck:
        model = self.load(segments)
        runs = [run(model, probe) for probe in self.probes]
        return summary([compare(w, r, self.routers) for w, r in zip(self.whole, runs, strict=True)], self.rounding)

    def flipped(self, name: str, at: int, bits: int) -> _core.SegmentList:
        offset = self.infos[name].offset + at
        return self.segments.with_bytes([(offset, bytes([self.segments.read(offset, 1)[0] ^ bits]))])

    def swapped(self, name: str, a: int, b: int) -> _core.SegmentList:
        """Two experts' slices of a tensor in each other's place."""
        info = self.infos[name]
        size = info.nbytes // info.shape[0]
        places = [info.offset + i * size for i in (a, b)]
        first, second = (self.segments.read(place, size) for place in places)
        return self.segments.with_bytes([(places[0], second), (places[1], first)])


@pytest.fixture(scope="module")
def bench(tinymoe: Path) -> Bench:
    return Bench(tinymoe, random_keep(GGUFMap(tinymoe), 62, 3))


def test_the_sound_shard_passes(bench: Bench) -> None:
    assert bench.judge(bench.segments).agrees
    assert bench.judge(jittered(bench.segments)).agrees


# The highest byte of a number: its exponent. f32 has it fourth of four, f16 second of two; a block of q8_0 is 34 bytes
# long and begins with its scale in f16.
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize(
    ("tensor", "at", "bits"),
    [
        ("attn_norm", 4 * 17 + 3, 0x02),
        ("attn_q", 2 * 4001 + 1, 0x40),
        ("attn_v", 2 * 4001 + 1, 0x40),
        ("attn_output", 2 * 4001 + 1, 0x40),
        ("ffn_gate_inp", 4 * (192 * 7 + 11) + 3, 0x02),
        ("ffn_gate_exps", 34 * (6 * 32 * 5 + 6 * 3 + 2) + 1, 0x40),
        ("ffn_up_exps", 34 * (6 * 32 * 61 + 6 * 8 + 1) + 1, 0x40),
        ("ffn_down_exps", 34 * (192 * 30 + 101) + 1, 0x40),
    ],
)
def test_a_wrong_byte(bench: Bench, layer: int, tensor: str, at: int, bits: int) -> None:
    found = bench.judge(bench.flipped(f"blk.{layer}.{tensor}.weight", at, bits))
    assert found.problem is not None


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("tensor", ["ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])
def test_experts_in_the_wrong_place(bench: Bench, layer: int, tensor: str) -> None:
    found = bench.judge(bench.swapped(f"blk.{layer}.{tensor}.weight", 20, 21))
    assert found.problem is not None


def test_the_expert_is_named(bench: Bench) -> None:
    """What the first layer reads is the same to the last bit, so that one weight of one expert is seen."""
    found = bench.judge(bench.flipped("blk.0.ffn_down_exps.weight", 34 * (192 * 30 + 101) + 1, 0x04))
    assert found.problem is not None
    assert "norms of layer 0 are" in found.problem
    assert f"for expert {np.flatnonzero(bench.keep[0])[30]} as for others" in found.problem


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_up_exps", "blk.4.ffn_gate_inp", "blk.2.attn_k", "output_norm", "token_embd"]
)
def test_every_byte_is_compared(name: str, tinymoe: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard.gguf"
    moeshard.split(tinymoe, "0-61", path)
    info = next(info for info in GGUFMap(path).tensor_infos if info.name == f"{name}.weight")
    good = path.read_bytes()
    for at in np.random.default_rng(4).integers(0, info.nbytes, 5):
        damaged = bytearray(good)
        damaged[info.offset + at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(moeshard.MoeshardError, match=rf"byte {at} of tensor '{name}\.weight'"):
            moeshard.verify(path, tinymoe, logits=True, n_threads=THREADS)


# The judgement itself.


@dataclass
class Layout:
    gating: str
    n_expert_groups: int
    n_expert_groups_used: int
    hash_layers: tuple[int, ...] = (7,)


def routers(n_groups: int = 1, n_searched: int = 1, gating: str = "softmax") -> Routers:
    return Routers(Layout(gating, n_groups, n_searched), {1: np.array([0, 0.5, 0, 0, 0, 0, 0, 0], np.float32)})


def test_how_far_a_choice_is_from_the_scores() -> None:
    scores = np.array([0.30, 0.10, np.nan, 0.20, 0.19, 0.05, 0.01, 0.02], dtype=np.float32)
    plain = routers()
    assert plain.gap(0, scores, np.array([0, 3])) <= 0
    assert plain.gap(0, scores, np.array([0, 4])) == pytest.approx(0.01, abs=1e-6)
    assert plain.gap(0, scores, np.array([4, 5, -1])) == pytest.approx(0.25, abs=1e-6)
    # The bias of layer 1 makes expert 1 the first choice.
    assert plain.gap(1, scores, np.array([0, 1])) <= 0
    assert plain.gap(1, scores, np.array([0, 3])) == pytest.approx(0.40, abs=1e-6)
    assert plain.gap(7, scores, np.array([0, 3])) == np.inf, "looked up by token id"
    logits = routers(gating="softmax_weight")
    assert logits.gap(0, np.log(scores), np.array([0, 4])) == pytest.approx(0.01 / 0.30, abs=1e-6)


def test_how_far_a_choice_of_groups_is() -> None:
    """Four groups of two, two of which are searched; a group's score is the sum of its two."""
    scores = np.array([0.30, 0.10, 0.25, 0.14, 0.20, 0.18, 0.02, 0.01], dtype=np.float32)
    grouped = routers(n_groups=4, n_searched=2)
    assert grouped.gap(0, scores, np.array([0, 2])) <= 0
    # The third group has 0.38 beside 0.39: each of its scores would have to rise by half of that.
    assert grouped.gap(0, scores, np.array([0, 4])) == pytest.approx(0.005, abs=1e-6)
    assert grouped.gap(0, scores, np.array([0, 6])) == pytest.approx((0.39 - 0.03) / 2, abs=1e-6)


def quiet(noise: float) -> Comparison:
    return Comparison(32, 32, (), {(0, "scores"): Spread(noise, noise)}, Spread(noise, noise), 32, 32)


@pytest.mark.parametrize(
    ("gap", "noise", "problem"), [(1e-5, 1e-5, None), (1e-2, 1e-5, "past scores"), (1e-2, 1e-2, None)]
)
def test_a_different_choice_needs_a_near_tie(gap: float, noise: float, problem: str | None) -> None:
    found = replace(quiet(1e-5), swaps=(Swap(0, 3, gap, noise),))
    said = summary([found], [quiet(1e-2)]).problem
    assert said is None if problem is None else problem in (said or "")


def test_what_is_no_number_is_no_agreement(bench: Bench) -> None:
    broken = bench.flipped("output_norm.weight", 4 * 17 + 3, 0x40)  # 1 becomes infinite
    assert bench.judge(broken).problem == "some logits are no numbers"


def test_nothing_compared_is_no_agreement() -> None:
    found = replace(quiet(1e-5), swaps=(Swap(0, 3, 0.0, 1e-5),), logits=None, n_compared=0)
    assert "no logits could be compared" in (summary([found], [quiet(1e-5)]).problem or "")


def test_what_was_not_measured_is_no_agreement() -> None:
    unmeasured = replace(quiet(1e-3), logits=None, n_compared=0)
    assert "could not be measured" in (summary([quiet(1e-5)], [unmeasured]).problem or "")
    assert summary([quiet(1e-5)], [unmeasured, quiet(1e-3)]).problem is None


def test_the_words_for_it() -> None:
    found = replace(quiet(1e-3), swaps=(Swap(0, 3, 2e-3, 1e-3),), n_compared=16)
    routing, logits = lines(summary([found], [quiet(1e-2)]))
    assert routing == (
        "routing: 1 of 32 choices of experts differ, each between scores within 2.0e-03 of each other "
        "(rounding explains 8.0e-03)"
    )
    assert logits.startswith(
        "logits of the 16 of 32 tokens whose experts are the same: those of the masked model, within"
    )
    assert "bit for bit" in lines(summary([quiet(0)], []))[1]


# Layers that use different numbers of experts per token.


@pytest.mark.parametrize("options", [{}, {"clamp": True}, {"n_expert_used": 2}])
def test_layers_with_their_own_experts_per_token(options: dict[str, int], make: Make, tmp_path: Path) -> None:
    path = make("nemotron_h_moe+own-numbers")
    used = GGUFMap(path).moe_layout().n_expert_used
    assert used == [0, 0, 2, 4, 3]
    n_keep = 3 if options.get("clamp") else 8
    moeshard.split(path, random_keep(GGUFMap(path), n_keep, 5), tmp_path / "shard.gguf", **options)
    shard = GGUFMap(tmp_path / "shard.gguf").moe_layout()
    expected = [min(n, options.get("n_expert_used", n), n_keep) for n in used]
    assert shard.n_expert_used == expected
    found = moeshard.verify(tmp_path / "shard.gguf", path, logits=True, n_threads=THREADS).logits
    assert found is not None
    assert found.agrees, found.problem
