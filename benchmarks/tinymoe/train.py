"""`python -m tinymoe train`: one model, by wall clock, resumable.

The batch is split over worker processes that share the weights. The learning rate warms up, stays, and falls
linearly to zero over the last part of the time given. A checkpoint holds everything (weights, optimisers,
position in the data, seconds trained): a later call with more minutes goes on from it; best from `stable.pt`,
which is the checkpoint before the fall.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from .config import CONFIGS
from .export import read
from .kernels import kernel
from .model import Model, cross_entropy
from .optim import optimiser_state, optimisers, restore
from .sources import DOMAINS, WEIGHTS
from .team import Checkpoint, Team


@dataclass
class Options:
    """How to train. `minutes` is wall time in all, over every resumption."""

    name: str
    corpus: Path
    out: Path
    minutes: float
    init: Path | None = None  # GGUF to start from where there is no checkpoint
    batch_tokens: int = 4096
    context: int = 256
    decay_context: int = 512
    decay_share: float = 0.35
    warmup_steps: int = 60
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    balance: float = 0.01  # factor on each softmax layer's balance loss
    bias_rate: float = 0.001  # step of the selection bias of sigmoid layers
    save_every: float = 240.0  # seconds
    workers: int = 2
    threads: int = 1  # of each worker
    seed: int = 0


class Windows:
    """Endless windows of one domain: each pass goes through all of it in a new order and at a new offset."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self.rng = np.random.default_rng([seed, len(self.tokens)])
        self.length, self.order, self.at, self.offset = 0, np.empty(0, dtype=np.int64), 0, 0

    def __getstate__(self) -> dict[str, object]:
        """Checkpoints keep the position in the text, not the text."""
        return {k: v for k, v in self.__dict__.items() if k != "tokens"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.tokens = np.memmap(self.path, dtype=np.uint16, mode="r")

    def next(self, length: int) -> Tensor:
        """The next `length + 1` tokens: inputs and, shifted by one, targets."""
        if self.length != length or self.at >= len(self.order):
            self.offset = int(self.rng.integers(length))
            self.order = self.rng.permutation((len(self.tokens) - self.offset - 1) // length)
            self.length, self.at = length, 0
        start = self.offset + int(self.order[self.at]) * length
        self.at += 1
        return torch.from_numpy(self.tokens[start : start + length + 1].astype(np.int64))


class Mixture:
    """Batches that hold every domain by its weight, as evenly as whole windows allow."""

    def __init__(self, corpus: Path, seed: int) -> None:
        self.windows = {d: Windows(corpus / "train" / f"{d}.bin", seed) for d in DOMAINS}
        self.credit = dict.fromkeys(DOMAINS, 0.0)

    def batch(self, tokens: int, length: int, worker: int, workers: int) -> Tensor:
        """The rows of one worker, (rows, length + 1); all workers go through the same sequence of rows."""
        rows = []
        for i in range(tokens // length):
            for d in DOMAINS:
                self.credit[d] += WEIGHTS[d]
            best = max(DOMAINS, key=lambda d: self.credit[d])
            self.credit[best] -= 1.0
            row = self.windows[best].next(length)
            if i % workers == worker:
                rows.append(row)
        return torch.stack(rows)


def learning_rate(share: float, step: int, o: Options) -> float:
    """Factor on both learning rates at `share` (0..1) of the time."""
    return min(1.0, (step + 1) / o.warmup_steps) * min(1.0, max(0.0, (1.0 - share) / o.decay_share))


def train(o: Options) -> None:
    """Train in `o.workers` processes: on a busy machine they wait for each other once a step, not once a product."""
    torch.manual_seed(o.seed)
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "options.json").write_text(json.dumps(asdict(o), default=str, indent=1) + "\n")
    kernel()  # compiled here, once, before the workers look for it
    model = Model(CONFIGS[o.name])
    state = Checkpoint(o.out / "checkpoint.pt").read()
    if state:
        model.load_state_dict(state["model"])
    elif o.init:
        model = read(o.init, model.c)
    model.share_memory()
    team = Team.create(model, o.workers)
    spawn(_work, (model, team, o), nprocs=o.workers)


def _work(rank: int, model: Model, team: Team, o: Options) -> None:
    """One worker: the same loop in each, on its own rows of every batch."""
    torch.set_num_threads(o.threads)
    checkpoint = Checkpoint(o.out / "checkpoint.pt")
    own = team.owned(model, rank)
    opts = optimisers(own, o.muon_lr, o.adam_lr)
    base = [[g["lr"] for g in opt.param_groups] for opt in opts]
    data, step, tokens, before = Mixture(o.corpus, o.seed), 0, 0, 0.0
    state = checkpoint.read()
    if state:
        restore(opts, own, state["optimiser"])
        data, step, tokens, before = state["data"], state["step"], state["tokens"], state["seconds"]
        team.load.copy_(state["load"])
    start = saved = time.monotonic()
    routers, counted = model.routers(), 0
    decaying = before >= 60 * o.minutes * (1 - o.decay_share)
    while True:
        if rank == 0:
            team.seconds.fill_(before + time.monotonic() - start)
            team.save.fill_(time.monotonic() - saved > o.save_every)
        team.barrier.wait()
        seconds = float(team.seconds)
        share = seconds / (60 * o.minutes)
        decay = share >= 1 - o.decay_share
        if bool(team.save) or share >= 1 or decay > decaying:
            facts = {"model": model.state_dict(), "data": data, "step": step, "tokens": tokens, "seconds": seconds,
                     "config": model.c, "load": team.load}  # fmt: skip
            checkpoint.write(facts, optimiser_state(opts, own), rank, team)
            if decay > decaying and rank == 0:  # a later, longer training starts here, not from the decayed end
                shutil.copy(checkpoint.path, o.out / "stable.pt")
            decaying, saved = decay, time.monotonic()
        if share >= 1:
            return
        factor = learning_rate(share, step, o)
        for opt, rates in zip(opts, base, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        rows = data.batch(o.batch_tokens, o.decay_context if decay else o.context, rank, o.workers)
        hidden = model.hidden(rows[:, :-1])
        loss = cross_entropy(hidden.flatten(0, 1), model.embedding, rows[:, 1:].flatten())
        balance = torch.stack([r.balance_loss(team.load[i]) for i, r in enumerate(routers)]).sum()
        (loss if model.c.sigmoid else loss + o.balance * balance).backward()
        team.step(model, rank, opts, torch.stack([r.load() for r in routers]), loss.item())
        if rank == 0:
            for i, router in enumerate(routers):
                router.move_bias(o.bias_rate, team.load[i])
        step, tokens, counted = step + 1, tokens + o.batch_tokens, counted + 1
        if rank == 0 and step % 20 == 0:
            line = (
                f"step {step} tokens {tokens} loss {float(team.losses.mean()) / counted:.4f} "
                f"balance {balance.item() / len(routers):.3f} max_load {float(team.load.max()):.3f} "
                f"lr {factor:.3f} seconds {seconds:.0f}"
            )
            with (o.out / "train.log").open("a") as log:
                print(line, file=log)
            team.losses.zero_()
            counted = 0
