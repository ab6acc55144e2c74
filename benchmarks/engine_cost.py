"""What masks and traces cost, as ratios measured in one run.

    python benchmarks/engine_cost.py [MODEL...]     # by default the embedded one

Each variant is timed right beside its plain twin, many times in turn, and the ratio of the pair is what counts: its
median, with a 95 % bootstrap interval. One thread and CPU time, so that neighbours on the machine do not count.
Speeds are plain time / variant time: 1.00 is free, 0.98 costs 2 %.

A trace is compared with two prefills. One computes logits for all tokens, so that both run every layer for every token
(the trace saves the vocabulary projection, which is most of a small model). The other computes none, and then llama.cpp
leaves out the last layer's experts too: a trace needs them, which on a model of few layers is most of what it costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

import moeshard

Run = Callable[[], None]


def seconds(run: Run) -> tuple[float, float]:
    """Return CPU time and wall time of a run."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def paired_seconds(plain: Run, variant: Run, rounds: int) -> np.ndarray:
    """Time pairs in alternating order: float64 (rounds, plain and variant, CPU and wall)."""
    plain(), variant()
    times = np.empty((rounds, 2, 2))
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            times[i, which] = seconds((plain, variant)[which])
    return times


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval."""
    medians = np.median(np.random.default_rng(0).choice(values, (2000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def paired_ratio(plain: Run, variant: Run, rounds: int) -> tuple[float, float, float]:
    """Return the median of plain/variant in CPU time over pairs in alternating order, and its 95 % interval."""
    cpu = paired_seconds(plain, variant, rounds)[:, :, 0]
    return median_interval(cpu[:, 0] / cpu[:, 1])


def random_keep(model: moeshard.Model, seed: int = 0) -> np.ndarray:
    """Return half of the experts of each layer."""
    rng = np.random.default_rng(seed)
    keep = np.zeros((model.n_layer, model.n_expert), dtype=bool)
    for row in keep:
        row[rng.choice(model.n_expert, model.n_expert // 2, replace=False)] = True
    return keep


def measure(path: str, rounds: int, n_prompt: int, n_decode: int) -> None:
    model = moeshard.Model(path, n_threads=1, n_ctx=n_prompt + n_decode)
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, model.n_vocab, n_prompt)
    keep = random_keep(model)
    plain, masked = model.session(), model.session()
    masked.set_keep(keep)

    def decode(session: moeshard.Session) -> Run:
        def run() -> None:
            session.reset()
            for token in prompt[:n_decode]:
                session.decode({0: [token]})

        return run

    def prefill(outputs: str) -> Run:
        def run() -> None:
            plain.reset()
            plain.decode({0: prompt}, outputs)

        return run

    def trace(*, probs: bool = False, norms: bool = False) -> Run:
        def run() -> None:
            plain.reset()
            plain.trace({0: prompt}, lambda chunk: None, probs=probs, norms=norms)

        return run

    def masked_prefill() -> None:
        masked.reset()
        masked.decode({0: prompt}, "none")

    print(f"{path}: {model.description}, {n_prompt} tokens of prefill, {n_decode} of decode, {rounds} rounds")
    rows: list[tuple[str, Run, Run]] = [
        ("masked decode / decode", decode(plain), decode(masked)),
        ("masked prefill / prefill", prefill("none"), masked_prefill),
    ]
    traces = [("ids, weights", trace()), ("+ probs", trace(probs=True)), ("+ norms", trace(norms=True))]
    traces.append(("+ probs, norms", trace(probs=True, norms=True)))
    for logits in ("all", "none"):
        rows += [(f"trace ({what}) / prefill, {logits} logits", prefill(logits), run) for what, run in traces]
    for name, base, variant in rows:
        median, low, high = paired_ratio(base, variant, rounds)
        print(f"  {name:46} {median:.3f}  [{low:.3f}, {high:.3f}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[str(moeshard.embedded_model())])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    args = parser.parse_args()
    for path in args.models:
        measure(path, args.rounds, args.prompt, args.decode)


if __name__ == "__main__":
    main()
