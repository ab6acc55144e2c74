"""How fast shards are written, beside `cp` of as many bytes, as ratios measured in one run.

    python benchmarks/split_speed.py [--dir FOLDER] [--layers 4] [--rounds 9]
    python benchmarks/split_speed.py --sparse [--dir FOLDER]

A model of the shapes of Qwen3-30B-A3B (benchmarks/synthetic.py) is split, half of the experts to a shard: the first 64
of each layer ("contiguous") or 64 at random ("scattered"), one shard or both in one pass. Right beside each, in turn,
`cp` copies files of exactly the shards' sizes on the same file system, as it does by default and without reflinks (it
then reads and writes). What counts is the ratio of the pair, cp's time / the split's: its median, with a 95 % bootstrap
interval. 1.00 is the speed of cp, more is faster. Times end when the bytes are on the disk: `cp` is followed by
`sync FILE`. A split always flushes its files; "unflushed" compares that with a `cp` that does not.

Memory is the peak of what the process holds beyond mapped files (RssAnon) over what it held before.

--sparse times the whole of a model of Kimi-K2.5's shape (benchmarks/sparse.py): planning, splitting 8 ways, verifying
each shard; none of it may take disk space.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sparse
import synthetic

import moeshard
from moeshard import GGUFMap, _core

Keep = npt.NDArray[np.bool_]
Run = Callable[[], None]


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the largest growth of anonymous memory so far."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        thread.join()


def seconds(run: Run, outputs: list[Path]) -> float:
    """Time `run`, which writes `outputs`, from a state in which they are not there."""
    for path in outputs:
        path.unlink(missing_ok=True)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interval(ratios: list[float]) -> str:
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return f"{np.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def keeps_of(n_layer: int, n_expert: int) -> dict[str, Keep]:
    """Return half of the experts of each layer, in one piece and scattered."""
    rng = np.random.default_rng(0)
    contiguous = np.zeros((n_layer, n_expert), dtype=bool)
    contiguous[:, : n_expert // 2] = True
    return {"contiguous": contiguous, "scattered": rng.permuted(contiguous, axis=1)}


def copy(sources: list[Path], outputs: list[Path], *options: str, flush: bool = True) -> Run:
    def run() -> None:
        for source, output in zip(sources, outputs, strict=True):
            subprocess.run(["cp", *options, source, output], check=True)
        if flush:
            subprocess.run(["sync", *outputs], check=True)

    return run


def compare(model: Path, folder: Path, name: str, keeps: list[Keep], rounds: int, jobs: int) -> int:
    """Print one row; return the peak of memory in bytes."""
    source = GGUFMap(model)
    lists = [_core.shard_segments(source, keep)[0] for keep in keeps]
    outputs = [folder / f"out{i}.gguf" for i in range(len(keeps))]
    same = [folder / f"same{i}.gguf" for i in range(len(keeps))]
    _core.write_segments(lists, same, force=True)

    def split() -> None:
        _core.write_segments(lists, outputs, jobs=jobs)

    copies = [
        copy(same, outputs),
        copy(same, outputs, "--reflink=never"),
        copy(same, outputs, flush=False),
    ]
    with peak_memory() as peak:
        seconds(split, outputs)
    ratios: list[list[float]] = [[] for _ in copies]
    for i in range(rounds):
        for twin, found in zip(copies, ratios, strict=True):
            first, second = (split, twin) if i % 2 == 0 else (twin, split)
            times = seconds(first, outputs), seconds(second, outputs)
            found.append(times[1] / times[0] if i % 2 == 0 else times[0] / times[1])
    for path in outputs + same:
        path.unlink()
    size = sum(segments.size for segments in lists) / 2**30
    print(f"  {name:24} {size:5.2f} GiB  " + "  ".join(f"{interval(found):18}" for found in ratios), flush=True)
    return peak()


def measure(model: Path, folder: Path, rounds: int, jobs: int) -> None:
    layout = GGUFMap(model).moe_layout()
    keeps = keeps_of(layout.n_layer, layout.n_expert)
    print(f"{model.name}, {model.stat().st_size / 2**30:.2f} GiB, {rounds} rounds; time of cp / time of split")
    heads = ["cp", "cp --reflink=never", "cp, unflushed"]
    print(" " * 38 + "  ".join(f"{head:18}" for head in heads))
    peaks = []
    for name, keep in keeps.items():
        peaks.append(compare(model, folder, name, [keep], rounds, jobs))
        peaks.append(compare(model, folder, f"{name}, two shards", [keep, ~keep], rounds, jobs))
    print(f"peak memory beyond mapped files: {max(peaks) / 2**20:.1f} MiB")


def measure_sparse(folder: Path) -> None:
    path, out = folder / "kimi.gguf", folder / "shards"
    sparse.write(path)
    start = time.perf_counter()
    times: dict[str, float] = {}

    def lap(name: str) -> None:
        times[name] = time.perf_counter() - start - sum(times.values())

    with peak_memory() as peak:
        model = GGUFMap(path)
        plan = moeshard.plan_groups(model, 8)
        lap("plan")
        files = moeshard.split(model, plan, out)
        lap("split")
        for file in files:
            moeshard.verify(file.paths[0], model)
        lap("verify")
    paths = [Path(file.paths[0]) for file in files]
    on_disk = sum(path.stat().st_blocks * 512 for path in paths)
    apparent = sum(path.stat().st_size for path in paths)
    print(
        f"{path.stat().st_size / 2**30:.0f} GiB split into {len(paths)} shards of {apparent / 2**30:.0f} GiB together:"
    )
    print("  " + ", ".join(f"{name} {value:.1f} s" for name, value in times.items()))
    print(f"  together {sum(times.values()):.1f} s, {on_disk / 2**20:.1f} MiB on the disk")
    print(f"  peak memory beyond mapped files: {peak() / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where files are written; the model is kept there")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=0, help="threads that copy; 0 for as many as are useful")
    parser.add_argument("--sparse", action="store_true")
    args = parser.parse_args()
    parent = args.dir or Path.cwd()
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="split-speed-", dir=parent))
    try:
        if args.sparse:
            measure_sparse(folder)
            return
        model = (args.dir or folder) / f"synthetic-{args.layers}.gguf"
        if not model.exists():
            synthetic.write(model, args.layers)
        measure(model, folder, args.rounds, args.jobs)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
