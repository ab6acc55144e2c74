"""Several processes that train one model in shared memory, and the checkpoint they write together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .model import Model

#: How much of the running mean of the experts' load is kept from one step to the next.
_LOAD_MEMORY = 0.8


@dataclass
class Team:
    """What the workers share. Every worker owns some parameters: it alone updates them."""

    workers: int
    barrier: Any  # multiprocessing.Barrier, which is no type
    grads: dict[str, Tensor]  # by parameter: (workers, *shape)
    loads: Tensor  # (workers, routed layers, E) of the last batch
    load: Tensor  # (routed layers, E): running mean
    losses: Tensor  # (workers,): sums since the last report
    seconds: Tensor
    save: Tensor

    @staticmethod
    def create(model: Model, workers: int) -> Team:
        context = torch.multiprocessing.get_context("spawn")
        layers, experts = len(model.routers()), model.c.experts
        load = torch.full((layers, experts), model.c.used / experts)
        team = Team(
            workers=workers,
            barrier=context.Barrier(workers),
            grads={n: torch.zeros(workers, *p.shape) for n, p in model.named_parameters()},
            loads=load.repeat(workers, 1, 1),
            load=load,
            losses=torch.zeros(workers, dtype=torch.float64),
            seconds=torch.zeros((), dtype=torch.float64),
            save=torch.zeros((), dtype=torch.bool),
        )
        for t in [*team.grads.values(), team.loads, team.load, team.losses, team.seconds, team.save]:
            t.share_memory_()
        return team

    def owned(self, model: Model, rank: int) -> dict[str, nn.Parameter]:
        """The parameters of one worker: dealt out largest first, always to the one that has least."""
        size = [0] * self.workers
        out = {}
        for name, p in sorted(model.named_parameters(), key=lambda item: -item[1].numel()):
            owner = size.index(min(size))
            size[owner] += p.numel()
            if owner == rank:
                out[name] = p
        return out

    def step(self, model: Model, rank: int, opts: list[torch.optim.Optimizer], load: Tensor, loss: float) -> None:
        """Hand in this worker's gradients, wait for all, and update the parameters it owns."""
        self.loads[rank], self.losses[rank] = load, self.losses[rank] + loss
        for name, p in model.named_parameters():
            assert p.grad is not None
            self.grads[name][rank] = p.grad
            p.grad = None
        self.barrier.wait()
        for name, p in self.owned(model, rank).items():
            p.grad = self.grads[name].mean(0)
        for opt in opts:
            opt.step()
        if rank == 0:
            self.load.lerp_(self.loads.mean(0), 1 - _LOAD_MEMORY)
        model.zero_grad(set_to_none=True)


@dataclass
class Checkpoint:
    """One file: weights, optimiser state by parameter name, position in the data, time trained."""

    path: Path

    def read(self) -> dict[str, Any]:
        """What was written; empty if nothing was."""
        if not self.path.exists():
            return {}
        return torch.load(self.path, weights_only=False)  # type: ignore[no-any-return]

    def write(self, facts: dict[str, Any], state: dict[str, dict[str, Tensor]], rank: int, team: Team) -> None:
        """Called by all workers. Written beside, then renamed: an interrupted write leaves the last one whole."""
        part = self.path.with_suffix(f".{rank}.part")
        torch.save(state, part)
        team.barrier.wait()
        if rank == 0:
            merged: dict[str, dict[str, Tensor]] = {}
            for i in range(team.workers):
                file = self.path.with_suffix(f".{i}.part")
                merged |= torch.load(file, weights_only=False)
                file.unlink()
            whole = self.path.with_suffix(".part")
            torch.save({**facts, "optimiser": merged}, whole)
            os.replace(whole, self.path)
        team.barrier.wait()
