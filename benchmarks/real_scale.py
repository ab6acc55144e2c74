"""Profiles and plans at the size of the largest models: bytes, memory, seconds, and what condensing costs in quality.

    python benchmarks/real_scale.py [--shapes 94x128,61x384] [--sequences 10000] [--nodes 8] [-o OUT.md]
    python benchmarks/real_scale.py --quality [--windows 16]

Made-up traffic of 10 domains, each of 6 topics: a sequence of 512 tokens, 8 experts each, leaves a part of a layer's
experts out, and has its domain's and its topic's favourites. It goes through all that an analysis does but the model:
batches are entered and kept in a file as they would be at 5,000 tokens/s, some 300 sequences of all domains each half
minute; then the profile is saved, and planned from, with a quarter of the experts on each node. Each step runs in a
process of its own, whose peak memory is that of the whole process.

--quality measures on the embedded model, by held-out text, what plans lose that look at fewer groups than sequences.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import moeshard
from moeshard.evaluation.losses import measure_losses
from moeshard.evaluation.scores import Scorer
from moeshard.gguf.identity import ModelIdentity
from moeshard.placement.nodes import masked_nodes
from moeshard.planning import islands as search
from moeshard.planning.planner import choose_experts
from moeshard.profile.growth import Growth, Keeper
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile, read_profile, unfinished
from moeshard.runtime.session import Statistics
from moeshard.traffic.domains import embedded_traffic

N_DOMAINS, N_TOPICS, N_TOKENS, TOP_K = 10, 6, 512, 8
SEEDS = 3
PLACED = ("both", "oracle")
PER_KEEP = 300
"""Sequences between two times that what was measured is kept: half a minute at 5,000 tokens/s."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="94x128,61x384", help="layers x experts")
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--windows", type=int, default=16, help="of held-out text per domain, for --quality")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS, metavar=("NAME", "FILE"))
    parser.add_argument("-o", "--out", type=Path, help="where the Markdown goes; standard output by default")
    options = parser.parse_args()
    if options.step:
        print(json.dumps(_step(*options.step, options)))
        return
    text = "\n".join(_quality(options) if options.quality else _scale(options)) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")


def _scale(options: argparse.Namespace) -> Iterator[str]:
    yield f"{options.sequences:,} sequences of {N_TOKENS} tokens in {N_DOMAINS} domains, {options.nodes} nodes:\n"
    yield "Seconds, and in brackets those of all processors together.\n"
    yield (
        "| layers x experts | cells held | file | kept, each half minute | saved | read | islands | with layers of "
        "different size | peak memory: measured | planned |"
    )
    yield f"|{'---|' * 10}"
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "p.npz"
            made, plain, free = (_child(name, file, shape, options) for name in ("make", "plan", "plan-per-layer"))
        yield (
            f"| {shape.replace('x', ' x ')} | {made['held']:.0%} | {made['bytes'] / 1e9:.2f} GB | "
            f"{_both(made['keep'], 1)}, at most {_both(made['keep_most'], 1)} | {_both(made['save'])} | "
            f"{_both(plain['read'])} | {_both(plain['search'])} | {_both(free['search'])} | "
            f"{made['peak'] / 1e9:.2f} GB | {max(plain['peak'], free['peak']) / 1e9:.2f} GB |"
        )


def _both(seconds: list[float], digits: int = 0) -> str:
    return f"{seconds[0]:.{digits}f} ({seconds[1]:.{digits}f})"


def _child(name: str, file: Path, shape: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", name, str(file), "--shapes", shape]
    command += ["--sequences", str(options.sequences), "--nodes", str(options.nodes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(shape, name, found, file=sys.stderr, flush=True)
    return found


def _step(name: str, file: str, options: argparse.Namespace) -> dict[str, Any]:
    n_layer, n_expert = (int(n) for n in options.shapes.split("x"))
    found = _make(file, n_layer, n_expert, options.sequences) if name == "make" else _plan(file, name, options.nodes)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def _make(file: str, n_layer: int, n_expert: int, n_sequences: int) -> dict[str, Any]:
    per_batch = PER_KEEP // N_DOMAINS
    domain = (np.arange(n_sequences) // per_batch % N_DOMAINS).astype(np.int32)
    identity = ModelIdentity("made up", "qwen3moe", "0" * 64, n_layer, n_expert, list(range(n_layer)))
    names = [f"domain-{index}" for index in range(N_DOMAINS)]
    growth = Growth(unfinished(identity, names, np.arange(n_layer, dtype=np.int32), domain, None, {"seconds": 0.0}))
    keeper = Keeper(growth, f"{file}.partial", resumed=False)
    seconds = []
    traffic = _Traffic(n_layer, n_expert)
    while growth.n < n_sequences:
        own = int(domain[growth.n])
        n = min(per_batch, n_sequences - growth.n)
        growth.add([N_TOKENS] * n, own, traffic.batch(own, n))
        if growth.n % PER_KEEP == 0 or growth.n == n_sequences:
            clock = _Clock()
            keeper.keep()
            seconds.append(clock.read())
    keeper.close()
    profile = growth.finish()
    clock = _Clock()
    profile.save(file)
    saved = clock.read()
    held = sum(int(profile.count[at].astype(bool).sum()) for at in range(0, n_sequences, 100))
    return {
        "bytes": Path(file).stat().st_size,
        "keep": np.median(seconds, axis=0).tolist(),
        "keep_most": np.max(seconds, axis=0).tolist(),
        "save": saved,
        "held": held / (len(range(0, n_sequences, 100)) * n_layer * n_expert),
    }


class _Clock:
    """Seconds since it was made: on the wall, and of all processors."""

    def __init__(self) -> None:
        self._started = time.monotonic(), time.process_time()

    def read(self) -> list[float]:
        return [time.monotonic() - self._started[0], time.process_time() - self._started[1]]


class _Traffic:
    """Made-up traffic. Random numbers come from a pool, from another place each time: drawing them would take hours."""

    def __init__(self, n_layer: int, n_expert: int):
        self._rng = rng = np.random.default_rng(0)
        shape = (n_layer, n_expert)
        everywhere = rng.normal(0, 0.8, shape)
        of_domain = rng.normal(0, 1.5, (N_DOMAINS, 1, *shape))
        of_topic = rng.normal(0, 1.2, (N_DOMAINS, N_TOPICS, *shape))
        self._likes = np.exp(everywhere + of_domain + of_topic).astype(np.float32)
        size = PER_KEEP // N_DOMAINS * n_layer * n_expert + (1 << 20)
        self._noise = np.exp(rng.normal(0, 0.8, size)).astype(np.float32)
        self._weight = rng.gamma(8, 1 / 64, size).astype(np.float32)
        self._norm = rng.gamma(16, 1 / 16, size).astype(np.float32)
        self._even = rng.random(size, dtype=np.float32)

    def batch(self, domain: int, n: int) -> Statistics:
        """What a batch of sequences of one domain, of random topics, adds up to."""
        likes = self._likes[domain, self._rng.integers(N_TOPICS, size=n)]
        likes *= self._some(self._noise, likes.shape)
        chance = np.minimum(likes * (TOP_K / likes.sum(axis=2, keepdims=True)), 0.9)
        count = (N_TOKENS * chance + self._some(self._even, chance.shape)).astype(np.int32)
        mass = count * self._some(self._weight, count.shape)
        saliency = mass * self._some(self._norm, count.shape)
        energy = saliency**2 / np.maximum(count, 1) * np.float32(1.25)
        rows = [array.transpose(1, 2, 0) for array in (count.astype(np.float32), saliency)]
        together, products = (np.matmul(own, own.transpose(0, 2, 1)) for own in rows)
        together /= N_TOKENS
        products /= N_TOKENS
        np.einsum("mee->me", together)[:] = count.sum(axis=0)
        np.einsum("mee->me", products)[:] = energy.sum(axis=0)
        return Statistics(
            count=count,
            mass=mass,
            saliency=saliency,
            energy=energy,
            entropy=np.full(count.shape[:2], 600.0),
            peak=np.ones(count.shape[1:], dtype=np.float32),
            together=together.astype(np.int32),
            cosaliency=products,
        )

    def _some(self, pool: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        start = int(self._rng.integers(pool.size - size + 1))
        return pool[start : start + size].reshape(shape)


def _plan(file: str, name: str, n_nodes: int) -> dict[str, Any]:
    clock = _Clock()
    profile = read_profile(file)
    read = clock.read()
    sizes = [profile.n_expert // 4] * n_nodes
    clock = _Clock()
    found = search.islands(profile, sizes, fewest=TOP_K if name == "plan-per-layer" else None)
    return {"read": read, "search": clock.read(), "lost": found.lost}


def _quality(options: argparse.Namespace) -> Iterator[str]:
    model = moeshard.Model(moeshard.embedded_model(), n_threads=2)
    profile = analyze(model, embedded_traffic("calibration"))
    n = profile.n_tokens.size
    yield f"tinymoe, {n} sequences; {options.windows} windows of each held-out domain; means of {SEEDS} seeds.\n"
    yield (
        "| nodes | groups | lost of the profile's squares | nats per token: placed | oracle | "
        "more than without groups: placed | oracle |"
    )
    yield f"|{'---|' * 7}"
    for n_nodes, size in ((2, 64), (4, 32)):
        yield from _groups(model, profile, [size] * n_nodes, [n, n // 2, n // 5], options.windows)


def _groups(
    model: moeshard.Model, profile: Profile, sizes: list[int], groups: list[int], n_windows: int
) -> Iterator[str]:
    keeps: list[np.ndarray] = []
    lost: dict[int, list[float]] = {number: [] for number in groups}
    rows: dict[int, list[list[int]]] = {number: [] for number in groups}
    for number in groups:
        search.GROUPS = number
        for seed in range(SEEDS):
            lost[number].append(search.islands(profile, sizes, seed=seed).lost)
            rows[number].append([_row(keeps, keep) for keep in choose_experts(profile, sizes, seed=seed)])
    heldout = embedded_traffic("heldout")
    losses = measure_losses(model, keeps, heldout, nodes=masked_nodes(model, keeps), n_windows=n_windows)
    scorer = Scorer(losses)
    first: list[np.ndarray] = []
    for number in groups:
        each = [losses.select(own) for own in rows[number]]
        cells = [f"{len(sizes)} x {sizes[0]}", str(number), f"{np.mean(lost[number]):.4f}"]
        values = []
        for probe in PLACED:
            excess = [Scorer(own).placed(own.placement(probe)).excess for own in each]
            cells.append(f"{np.mean(excess):.3f}")
            values.append(np.mean([own.placed_losses(own.placement(probe)) for own in each], axis=0))
        first = first or values
        for more, all_of_them in zip(values, first, strict=True):
            over, (low, high) = scorer.estimate(more - all_of_them)
            cells.append(f"{over:+.3f} [{low:+.3f}, {high:+.3f}]")
        yield f"| {' | '.join(cells)} |"


def _row(keeps: list[np.ndarray], keep: np.ndarray) -> int:
    """Where a keep stands in a list, to which it is added if need be: what is the same is measured once."""
    for row, other in enumerate(keeps):
        if np.array_equal(keep, other):
            return row
    keeps.append(keep)
    return len(keeps) - 1


if __name__ == "__main__":
    main()
