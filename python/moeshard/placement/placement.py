"""Which node should have this session: decided by one prefill of its prompt; docs/placing.md tells the whole story."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moeshard._core import MoeshardError
from moeshard.arrays import Tokens
from moeshard.placement.decision import (
    BOTH,
    LOSS,
    MIN_CAPTURED,
    MIN_QUALITY,
    MIN_TOKENS,
    SALIENCY,
    Placed,
    place_by_both,
    place_by_loss,
    place_by_saliency,
)
from moeshard.placement.nodes import plan_nodes
from moeshard.placement.probes import PROBES, prompt_losses, saliency
from moeshard.planning.plan import Plan, read_plan
from moeshard.runtime.model import Model
from moeshard.runtime.session import as_tokens
from moeshard.traffic.embedded import resolve_model

MAX_TOKENS = 512


class Placement:
    """Places sessions on the nodes of a plan. Safe to use from several threads.

    The whole model runs the prompt; nodes are masks on it, none needs to exist. Where nodes run by themselves they can
    measure the losses, and `place_by_loss` decides.
    """

    def __init__(
        self,
        plan: Plan | str | os.PathLike[str],
        model: Model | str | os.PathLike[str] | None = None,
        *,
        min_quality: float = MIN_QUALITY,
        min_captured: float = MIN_CAPTURED,
        min_tokens: int = MIN_TOKENS,
        max_tokens: int = MAX_TOKENS,
        n_threads: int = 0,
        n_gpu_layers: int = -1,
    ):
        """Make ready to place.

        Args:
            plan: the nodes, or the file that describes them.
            model: the whole model, loaded or a file; None: the file that the plan names.
            min_quality: probe ``loss`` refuses a session whose prompt the best node predicts with a perplexity above
                the whole model's divided by this, that is with more than ``-log(min_quality)`` nats per token over it.
                0 never refuses, 1 accepts no loss.
            min_captured: probe ``saliency`` refuses a session of whose prompt's saliency the best node holds less.
                Probe ``both`` refuses one that fits its best node less than the product of both limits.
            min_tokens: a prompt of fewer is refused: it says too little.
            max_tokens: of a longer prompt the last so many are looked at, those nearest to the answer.
            n_threads, n_gpu_layers: as for `moeshard.Model`, where `model` is not loaded yet.

        Raises:
            MoeshardError: plan or model cannot be read, the plan is of another model or names none, or a limit is out
                of range.
        """
        for name, value in (("min_quality", min_quality), ("min_captured", min_captured)):
            if not 0 <= value <= 1:
                raise MoeshardError(f"{name} must be between 0 and 1, got {value}")
        if not 2 <= min_tokens <= max_tokens:
            raise MoeshardError(
                f"min_tokens must be at least 2 and at most max_tokens, got {min_tokens} and {max_tokens}"
            )
        self.plan = plan if isinstance(plan, Plan) else read_plan(plan)
        if not isinstance(model, Model):
            path = planned_model(self.plan) if model is None else model
            model = Model(path, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
        self.model = model
        self.min_quality, self.min_captured = min_quality, min_captured
        self.min_tokens, self.max_tokens = min_tokens, max_tokens
        self._nodes = plan_nodes(model, self.plan)

    @property
    def names(self) -> list[str]:
        """The names of the nodes, in the order of the plan."""
        return [node.name for node in self.plan.nodes]

    def place(self, prompt: str | Tokens | Sequence[int], probe: str = BOTH) -> Placed:
        """Say which node should have the session of a prompt.

        Args:
            prompt: token ids (`moeshard.Model.chat_tokens` makes them of messages); or text, control tokens in it
                being read as such.
            probe: ``loss``: the node that predicts the prompt itself best, all nodes being computed, in one batch;
                ``saliency``: the one that holds most of what the whole model's router wants for it, which takes one
                prefill however many nodes there are; ``both``: by the two together, which is right most often.

        Raises:
            MoeshardError: an unknown probe, an empty prompt, one of a single token where losses are looked at, or
                tokens that the model does not have.
        """
        if probe not in PROBES:
            raise MoeshardError(f"unknown probe '{probe}'; choose {', '.join(PROBES[:-1])} or {PROBES[-1]}")
        tokens = self.model.tokenize(prompt, parse=True) if isinstance(prompt, str) else as_tokens(prompt)
        if not tokens.size:
            raise MoeshardError("the prompt is empty: there is nothing to place a session by")
        seen = tokens[-self.max_tokens :]
        limits = {"min_tokens": self.min_tokens, "n_cut": tokens.size - seen.size}
        if probe != SALIENCY and seen.size < 2:
            raise MoeshardError("the prompt is one token: none follows that could be predicted; use probe 'saliency'")
        # Also where the caller's thread runs this model under a mask: a session is placed by the whole model.
        with self.model.masked(None):
            return self._place(seen, probe, limits)

    def _place(self, seen: Tokens, probe: str, limits: dict[str, int]) -> Placed:
        if probe != LOSS:
            wanted, held = saliency(self.model, [node.keep for node in self.plan.nodes], seen)
        if probe == SALIENCY:
            return place_by_saliency(self.names, wanted, held, min_captured=self.min_captured, **limits)
        losses = prompt_losses(self.model, self._nodes, seen, self.max_tokens)
        if probe == LOSS:
            return place_by_loss(self.names, losses[1:], losses[0], min_quality=self.min_quality, **limits)
        min_fit = self.min_quality * self.min_captured
        return place_by_both(self.names, losses[1:], losses[0], wanted, held, min_fit=min_fit, **limits)

    def place_many(self, prompts: Sequence[str | Tokens | Sequence[int]], probe: str = BOTH) -> list[Placed]:
        """Place several sessions, one after the other; see `place`."""
        return [self.place(prompt, probe) for prompt in prompts]


def planned_model(plan: Plan) -> Path:
    """Return the path of the model that a plan file names.

    Raises:
        MoeshardError: it names none, or none is there.
    """
    name = plan.model.facts.get("path")
    if not isinstance(name, str):
        raise MoeshardError("the plan does not say where its model is (model.path): name the model too")
    path = resolve_model(name)
    if not path.is_file():
        raise MoeshardError(f"the model that the plan names is not there: '{name}': name the model too")
    return path
