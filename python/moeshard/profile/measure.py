"""Measuring which experts some traffic uses: one pass of prefill, everything kept per sequence."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeshard._core import GGUFMap, MoeshardError
from moeshard.arrays import Tokens
from moeshard.files.atomic import check_outputs
from moeshard.gguf.identity import identify
from moeshard.profile.growth import Growth, Keeper
from moeshard.profile.record import Profile, unfinished
from moeshard.progress import Progress
from moeshard.runtime.trace import check_finite
from moeshard.traffic.domains import Domain, check_names
from moeshard.traffic.likeness import sketch
from moeshard.traffic.windows import default_window, sequences

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

BATCH_TOKENS = 2048
SAVE_SECONDS = 30.0
"""Between two times that what was measured is written to a file, or `SAVE_TIMES` as long as that takes."""
SAVE_TIMES = 20.0


@dataclass(frozen=True)
class _Sequence:
    domain: int
    tokens: Tokens


def analyze(
    model: Model,
    domains: Sequence[Domain],
    *,
    n_tokens: int | None = None,
    window: int | None = None,
    layers: Sequence[int] | None = None,
    n_generate: int = 0,
    save_to: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Measure which experts the text of some domains uses.

    The text is computed once, in full batches without generating a token; memory does not grow with it beyond the
    profile itself. Tokens see no further back than their own sequence.

    Args:
        model: any that routes; under a mask of `Model.masked` the masked model is measured.
        domains: the traffic.
        n_tokens: about so many of each domain, evenly spread over it; None: all.
        window: tokens of a sequence; by default 512, or what the model was trained on where that is less.
        layers: which MoE layers to measure; None: all of them.
        n_generate: of each domain, also let the model continue so many sequences itself from their first half, and
            measure these answers too.
        save_to: where to keep what was measured so far, every half minute and at the end; to be removed when the
            profile is saved. `read_profile` reads it too.
        resume: go on from what an earlier call with the same arguments left in `save_to`.
        progress: see `Progress`; in tokens.

    Raises:
        MoeshardError: the model routes nothing, a layer has no experts, a text is too short, or what lies in `save_to`
            is of another model or other arguments, or `save_to` cannot be written.
    """
    started = time.monotonic()
    if model.n_expert == 0:
        raise MoeshardError(f"{model.path}: is a dense model: there is no routing to measure")
    if save_to is not None:
        check_outputs([save_to], [model.path], force=True)
    chosen = _check_layers(model, layers)
    window = window or default_window(model)
    if model.n_ctx_train and window > model.n_ctx_train:
        raise MoeshardError(f"sequences of {window} tokens: the model was trained on {model.n_ctx_train} at most")
    plan = _cut(model, domains, window, n_tokens)
    if n_generate:
        plan += _continue(model, plan, len(domains), window, n_generate)
    facts: dict[str, Any] = {
        "window": window,
        "n_tokens": n_tokens,
        "n_generate": n_generate,
        "texts": {domain.name: domain.digest for domain in domains},
        "sketches": {domain.name: sketch(domain) for domain in domains},
    }
    check_names(domains)
    profile = unfinished(
        identify(GGUFMap(model.path)),
        [domain.name for domain in domains],
        np.array(chosen, dtype=np.int32),
        np.array([sequence.domain for sequence in plan], dtype=np.int32),
        None,
        facts,
    )
    growth, keeper = _begin(profile, save_to, resume)
    started -= growth.profile.facts.get("seconds", 0.0)  # of the run that was interrupted
    try:
        _run(model, plan, growth, keeper, started, progress)
    finally:
        if keeper is not None:
            keeper.close()
    return growth.finish()


def _begin(profile: Profile, save_to: str | os.PathLike[str] | None, resume: bool) -> tuple[Growth, Keeper | None]:
    if save_to is None:
        return Growth(profile), None
    resumed = resume and os.path.exists(save_to)
    growth = Growth.resume(save_to, profile) if resumed else Growth(profile)
    return growth, Keeper(growth, save_to, resumed=resumed)


def batch_sequences(window: int) -> int:
    """Return how many sequences of so many tokens are computed in one batch."""
    return max(1, BATCH_TOKENS // window)


def _check_layers(model: Model, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return list(model.computed_layers)
    for layer in layers:
        if layer not in model.moe_layers:
            raise MoeshardError(f"layer {layer} routes nothing; the MoE layers are {model.moe_layers}")
        if layer not in model.computed_layers:
            raise MoeshardError(
                f"layer {layer} routes no token, being a block that predicts further ones, or one whose router is not "
                f"used; there is nothing to measure in it"
            )
    if not layers:
        raise MoeshardError("no layers to measure; leave out the option for all of them")
    return sorted(set(layers))


def _cut(model: Model, domains: Sequence[Domain], window: int, n_tokens: int | None) -> list[_Sequence]:
    """All sequences. Domains take turns, so that what an interrupted run has measured is of all of them."""
    if not domains:
        raise MoeshardError("there is no text to measure")
    cut = [sequences(model, domain, window, n_tokens) for domain in domains]
    per_batch = batch_sequences(window)
    plan = []
    for at in range(0, max(map(len, cut)), per_batch):
        for index, tokens in enumerate(cut):
            plan += [_Sequence(index, piece) for piece in tokens[at : at + per_batch]]
    return plan


def _continue(model: Model, plan: list[_Sequence], n_domains: int, window: int, number: int) -> list[_Sequence]:
    """The model's own answers to the first halves of some sequences of each domain, after these halves."""
    answers = []
    for index in range(n_domains):
        own = [sequence.tokens for sequence in plan if sequence.domain == index]
        for seed, at in enumerate(np.linspace(0, len(own) - 1, min(number, len(own))).astype(int)):
            prompt = own[at][: max(1, len(own[at]) // 2)]
            answer = model.generate(prompt, max_tokens=window - len(prompt), seed=seed)
            for _ in answer:
                pass
            answers.append(_Sequence(index, np.concatenate([prompt, answer.tokens])))
    return answers


def _run(
    model: Model,
    plan: list[_Sequence],
    growth: Growth,
    keeper: Keeper | None,
    started: float,
    progress: Progress | None,
) -> None:
    total = sum(len(sequence.tokens) for sequence in plan)
    profile = growth.profile
    window = max(len(sequence.tokens) for sequence in plan)
    per_batch = batch_sequences(window)
    scores_are_logits = model.layout.gating == "softmax_weight"
    due = time.monotonic() + SAVE_SECONDS
    if progress is not None:
        progress(int(profile.n_tokens.sum()), total)
    with model.session(n_seq=per_batch, n_ctx=window) as session:
        for batch in _batches(plan, growth.n, per_batch):
            session.reset()
            tokens = {seq: sequence.tokens for seq, sequence in enumerate(batch)}
            sums = session.measure(tokens, profile.layers.tolist(), scores_are_logits=scores_are_logits)
            for row, layer in enumerate(profile.layers):
                check_finite(model.path, int(layer), np.flatnonzero(~np.isfinite(sums.saliency[:, row]).all(axis=0)))
            growth.add([len(sequence.tokens) for sequence in batch], batch[0].domain, sums)
            profile.facts["seconds"] = time.monotonic() - started
            if progress is not None:
                progress(int(profile.n_tokens.sum()), total)
            if keeper is not None and time.monotonic() > due:
                due = time.monotonic() + max(SAVE_SECONDS, SAVE_TIMES * keeper.keep())
    if keeper is not None:
        keeper.keep()


def _batches(plan: list[_Sequence], done: int, per_batch: int) -> list[list[_Sequence]]:
    """Sequences that are still to be measured; those of a batch are of one domain."""
    batches: list[list[_Sequence]] = []
    for sequence in plan[done:]:
        if batches and len(batches[-1]) < per_batch and batches[-1][0].domain == sequence.domain:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches
