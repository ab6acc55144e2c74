"""The tables of the field, for any model: how concentrated routing is, and what nodes lose that hold some experts only.

    python benchmarks/reality_check.py MODEL [-n TOKENS] [--windows N] [-o OUT.md]
    python benchmarks/reality_check.py tinymoe -o docs/results/tinymoe.md

Experts are chosen on the calibration texts (or --calibration NAME=FILE), losses are measured on the held-out ones (or
--heldout NAME=FILE), which nothing is chosen or tuned by. Each window of 256 tokens begins with a prompt of 64 that
places the session and is not scored. Losses are nats per token over the whole model, mean over domains, with 95 %
intervals of a paired bootstrap over windows: of sessions sent to any node (hashed), to the node that a probe finds by
the prompt (placed: by loss and saliency together), and to the best one (oracle). "right", "over the oracle", "over
islands", top-1 and KL are of sessions as placed. Speeds are ratios of CPU time measured in turn, one thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from engine_cost import paired_ratio

import moeshard
from moeshard.evaluation.loops import Prompt, measure_loops
from moeshard.evaluation.losses import PROMPT, WINDOW, Losses, measure_losses
from moeshard.evaluation.scores import Interval, Scorer, Scores
from moeshard.keep.text import Keep
from moeshard.placement.nodes import NodeModel, masked_nodes, plan_nodes
from moeshard.placement.probes import PROBES
from moeshard.planning.budget import Use, shard_memory
from moeshard.planning.planner import ISLANDS, STRATEGY_NAMES, choose_experts, make_plan
from moeshard.profile.measure import analyze
from moeshard.profile.record import Profile
from moeshard.profile.statistics import concentration, summed_concentration, tops, verdict
from moeshard.recovery.recover import recover
from moeshard.traffic.domains import Domain, embedded_traffic, read_texts
from moeshard.traffic.embedded import resolve_model
from moeshard.traffic.windows import cut_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-n", "--tokens", type=int, help="of calibration text per domain; all by default")
    parser.add_argument("--windows", type=int, default=16, help="of held-out text per domain")
    parser.add_argument("--answers", type=int, default=8, help="per domain and node, to look for loops in; 0: none")
    parser.add_argument("--calibration", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--heldout", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--no-recovery", action="store_true", help="leave the row of recovered islands out")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, help="where the Markdown goes; standard output by default")
    options = parser.parse_args()
    if bool(options.calibration) != bool(options.heldout):
        parser.error("give both --calibration and --heldout, or neither")
    calibration = read_texts(options.calibration) if options.calibration else embedded_traffic("calibration")
    heldout = read_texts(options.heldout) if options.heldout else embedded_traffic("heldout")
    model = moeshard.Model(resolve_model(options.model), n_threads=options.threads)
    profile = analyze(model, calibration, n_tokens=options.tokens, progress=_say("analyze"))
    parts = [
        f"# Reality check: {Path(model.path).stem}\n",
        f"{model.n_layer} layers, {model.n_expert} experts, top-{model.n_expert_used}; "
        f"{profile.n_tokens.sum():,} tokens of calibration text in {len(calibration)} domains, {options.windows} "
        "windows of held-out text per domain. Made by\n"
        f"`python benchmarks/reality_check.py {' '.join(_command(options))}`.\n",
        *_concentration(profile),
    ]
    for n_nodes, part in ((2, 2), (4, 4), (8, 4)):
        parts += _nodes(model, profile, calibration, heldout, n_nodes, model.n_expert // part, options)
    text = "\n".join(parts)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    else:
        print(text)


def _command(options: argparse.Namespace) -> Iterator[str]:
    yield options.model if options.model == "tinymoe" else Path(options.model).name
    if options.tokens:
        yield f"-n {options.tokens}"
    if options.windows != 16:
        yield f"--windows {options.windows}"
    if options.no_recovery:
        yield "--no-recovery"
    if options.answers != 8:
        yield f"--answers {options.answers}"
    for name in ("calibration", "heldout"):
        yield from (f"--{name} {value}" for value in getattr(options, name))


def _concentration(profile: Profile) -> Iterator[str]:
    numbers = tops(profile.n_expert)
    yield "## Concentration\n"
    yield "Share of each layer's gate mass that its experts of most mass have.\n"
    yield "| layer | " + " | ".join(f"top {top}" for top in numbers) + " |"
    yield "|---|" + "---|" * len(numbers)
    for layer, row in zip(profile.layers, concentration(profile, numbers), strict=True):
        yield f"| {layer} | " + " | ".join(f"{value:.1%}" for value in row) + " |"
    summed = summed_concentration(profile, numbers)
    yield "| *summed over ids* | " + " | ".join(f"*{value:.1%}*" for value in summed) + " |"
    yield (
        "\nThe last line adds up experts of the same number in different layers, as older tools do. They have nothing "
        "to do with each other, so the sums are nearly even whatever the layers do.\n"
    )
    yield f"{verdict(profile)}\n"


@dataclass(frozen=True, eq=False)
class Served:
    """What one strategy's nodes lose."""

    label: str
    losses: Losses
    nodes: dict[str, NodeModel]

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.losses)

    @cached_property
    def hashed(self) -> Scores:
        return self.scorer.hashed()

    @cached_property
    def placed(self) -> dict[str, Scores]:
        return {probe: self.scorer.placed(self.losses.placement(probe)) for probe in (*PROBES, "oracle")}


def _measure(
    model: moeshard.Model, profile: Profile, heldout: list[Domain], n_nodes: int, size: int, windows: int
) -> list[Served]:
    """All strategies on the same text in one pass; nodes that hold the same are computed once."""
    used = model.n_expert_used
    more = min(size, used + used // 2)
    runs = [(name, used) for name in STRATEGY_NAMES] + ([(ISLANDS, more)] if more > used else [])
    different: dict[tuple[bytes, int], int] = {}
    keeps: list[Keep] = []
    tops: list[int] = []
    rows: list[list[int]] = []
    for name, top in runs:
        rows.append([])
        for keep in choose_experts(profile, [size] * n_nodes, name):
            row = different.setdefault((keep.tobytes(), top), len(keeps))
            if row == len(keeps):
                keeps.append(keep)
                tops.append(top)
            rows[-1].append(row)
    nodes = masked_nodes(model, keeps, tops)
    progress = _say(f"{n_nodes} nodes of {size} experts")
    losses = measure_losses(model, keeps, heldout, nodes=nodes, n_windows=windows, progress=progress)
    labels = [name if top == used else f"{name}, top-{top}" for name, top in runs]
    return [
        Served(label, losses.select(own), {f"node-{index}": nodes[row] for index, row in enumerate(own)})
        for label, own in zip(labels, rows, strict=True)
    ]


def _recover(
    model: moeshard.Model,
    profile: Profile,
    calibration: list[Domain],
    heldout: list[Domain],
    n_nodes: int,
    size: int,
    windows: int,
) -> Served:
    """Islands whose experts were fitted to the calibration texts; each is loaded as its shard."""
    plan = make_plan(model.path, profile, n_keep=[size] * n_nodes)
    with tempfile.TemporaryDirectory() as folder:
        recover(model, plan, folder, calibration)
        nodes = plan_nodes(model, plan, recovery=folder)
    keeps = [node.keep for node in plan.nodes]
    losses = measure_losses(model, keeps, heldout, nodes=nodes, n_windows=windows, progress=_say("recovered"))
    return Served("islands, recovered", losses, dict(zip((node.name for node in plan.nodes), nodes, strict=True)))


def _nodes(
    model: moeshard.Model,
    profile: Profile,
    calibration: list[Domain],
    heldout: list[Domain],
    n_nodes: int,
    size: int,
    options: argparse.Namespace,
) -> Iterator[str]:
    if size < model.n_expert_used:
        return
    memory = shard_memory(moeshard.GGUFMap(model.path), size, Use()).total
    read, write = _speed(model, size)
    yield f"## {n_nodes} nodes, {size} of {profile.n_expert} experts each\n"
    yield (
        f"{memory / 2**20:.1f} MiB a node with 4,096 tokens of context. Speed over the whole model's: reading "
        f"{read}, writing {write}.\n"
    )
    found = _measure(model, profile, heldout, n_nodes, size, options.windows)
    best = next(served for served in found if served.label == ISLANDS)
    if not options.no_recovery:
        found.append(_recover(model, profile, calibration, heldout, n_nodes, size, options.windows))
    columns = "hashed | placed | by loss | by saliency | oracle | right | over the oracle | over islands | top-1 | KL"
    yield f"| strategy | {columns} |"
    yield f"|{'---|' * 11}"
    for served in found:
        cells = [_excess(score) for score in (served.hashed, *served.placed.values())]
        where = served.losses.placement()
        agreement = served.placed["both"].agreement
        assert agreement is not None
        over = served.losses.placed_losses(where) - best.losses.placed_losses(best.losses.placement())
        cells += [
            f"{served.scorer.right(where):.0%}",
            _interval(*served.scorer.regret(where)),
            "" if served is best else _interval(*served.scorer.estimate(over)),
            f"{agreement.top1:.1%}",
            f"{agreement.kl:.3f}",
        ]
        yield f"| {served.label} | {' | '.join(cells)} |"
    yield ""
    placed = best.placed["both"].excess
    others = {served.label: served.hashed.excess for served in found}
    yield (
        f"islands, as placed, loses {placed / others['snake']:.0%} of what snake does, hashed, and "
        f"{placed / others['shared-core']:.0%} of shared-core's.\n"
    )
    if options.answers:
        for served in [best, *(other for other in found if other.label == "islands, recovered")]:
            yield from _loops(model, served, heldout, options)


def _loops(model: moeshard.Model, served: Served, heldout: list[Domain], options: argparse.Namespace) -> Iterator[str]:
    windows, owners = cut_windows(model, heldout, WINDOW, options.windows)
    where = served.losses.placement()
    found = measure_loops(
        model,
        served.nodes,
        [
            Prompt(heldout[owner].name, tokens[:PROMPT], int(node))
            for owner, tokens, node in zip(owners, windows, where, strict=True)
        ],
        n_answers=options.answers,
        progress=_say("answers"),
    )
    yield (
        f"Of {found.full.n} answers of {found.tokens} tokens, temperature {found.temperature}, degenerate loops are "
        f"(thresholds learned on as many other answers of the full model):\n"
    )
    yield "| answers of | loops |"
    yield "|---|---|"
    for name, rate in {"full model": found.full, **found.groups, f"{served.label}, placed": found.placed}.items():
        yield f"| {name} | {rate.rate:.1%} [{rate.ci[0]:.1%}, {rate.ci[1]:.1%}] |"
    yield ""


def _excess(score: Scores) -> str:
    return _interval(score.excess, score.excess_ci)


def _interval(value: float, interval: Interval) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _speed(model: moeshard.Model, size: int) -> tuple[str, str]:
    """Ratios whole model's CPU time / node's, reading 512 tokens and writing 32; the node has real, smaller tensors."""
    options = {"n_threads": 1, "n_ctx": 640}
    whole = moeshard.Model(model.path, **options)
    node = moeshard.Model(model.path, keep=f"0-{size - 1}", **options)
    prompt = np.random.default_rng(0).integers(3, model.n_vocab, 512)

    def write(which: moeshard.Model) -> None:
        for _ in which.generate(prompt[:8], max_tokens=32):
            pass

    ratios = (
        paired_ratio(lambda: _discard(whole.logits(prompt)), lambda: _discard(node.logits(prompt)), 7),
        paired_ratio(lambda: write(whole), lambda: write(node), 7),
    )
    reading, writing = (f"{median:.2f} [{low:.2f}, {high:.2f}]" for median, low, high in ratios)
    return reading, writing


def _discard(_: object) -> None:
    """Nothing is done with results that are only timed."""


def _say(what: str):
    def say(done: int, total: int) -> None:
        if done == total:
            print(what, file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    main()
