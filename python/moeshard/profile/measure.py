"""Measuring which experts some traffic uses: one pass of prefill, everything kept per sequence."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeshard._core import GGUFMap, MoeshardError
from moeshard.arrays import Tokens
from moeshard.gguf.identity import identify
from moeshard.profile.record import Profile, read_profile
from moeshard.progress import Progress
from moeshard.runtime.session import Statistics
from moeshard.runtime.trace import check_finite
from moeshard.traffic.domains import Domain, check_names
from moeshard.traffic.likeness import sketch
from moeshard.traffic.windows import default_window, sequences

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

BATCH_TOKENS = 2048
SAVE_SECONDS = 30.0


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
        save_to: where to keep what was measured so far, every half minute; removed at the end.
        resume: go on from what an earlier call with the same arguments left in `save_to`.
        progress: see `Progress`; in tokens.

    Raises:
        MoeshardError: the model routes nothing, a layer has no experts, a text is too short, or what lies in `save_to`
            is of another model or other arguments.
    """
    started = time.monotonic()
    if model.n_expert == 0:
        raise MoeshardError(f"{model.path}: is a dense model: there is no routing to measure")
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
    profile = _empty(model, domains, chosen, plan, facts)
    if resume and save_to is not None and os.path.exists(save_to):
        profile = _left_over(save_to, profile)
    started -= profile.facts.get("seconds", 0.0)  # of the run that was interrupted
    _run(model, plan, profile, started, save_to, progress)
    profile.facts["seconds"] = time.monotonic() - started
    if save_to is not None:
        Path(save_to).unlink(missing_ok=True)
    return profile


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


def _empty(
    model: Model, domains: Sequence[Domain], layers: list[int], plan: list[_Sequence], facts: dict[str, Any]
) -> Profile:
    check_names(domains)
    names = [domain.name for domain in domains]
    s, m, e, d = len(plan), len(layers), model.n_expert, len(names)
    return Profile(
        model=identify(GGUFMap(model.path)),
        domains=names,
        layers=np.array(layers, dtype=np.int32),
        domain=np.array([sequence.domain for sequence in plan], dtype=np.int32),
        n_tokens=np.zeros(s, dtype=np.int32),
        count=np.zeros((s, m, e), dtype=np.int32),
        mass=np.zeros((s, m, e), dtype=np.float32),
        saliency=np.zeros((s, m, e), dtype=np.float32),
        energy=np.zeros((s, m, e), dtype=np.float32),
        entropy=np.zeros((s, m), dtype=np.float32),
        peak=np.zeros((d, m, e), dtype=np.float32),
        together=np.zeros((d, m, e, e), dtype=np.int32),
        cosaliency=np.zeros((d, m, e, e), dtype=np.float32),
        facts=facts,
    )


def _left_over(path: str | os.PathLike[str], wanted: Profile) -> Profile:
    found = read_profile(path)
    same = (
        found.model.fingerprint == wanted.model.fingerprint
        and found.count.shape == wanted.count.shape
        and found.domains == wanted.domains
        and np.array_equal(found.domain, wanted.domain)
        and np.array_equal(found.layers, wanted.layers)
        and {**found.facts, "seconds": 0} == {**wanted.facts, "seconds": 0}
    )
    if not same:
        raise MoeshardError(
            f"{os.fspath(path)}: is of an analysis of another model or with other options; remove it to begin anew"
        )
    return found


def _run(
    model: Model,
    plan: list[_Sequence],
    profile: Profile,
    started: float,
    save_to: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> None:
    total = sum(len(sequence.tokens) for sequence in plan)
    done = int(profile.n_tokens.sum())
    window = max(len(sequence.tokens) for sequence in plan)
    per_batch = batch_sequences(window)
    scores_are_logits = model.layout.gating == "softmax_weight"
    saved = time.monotonic()
    if progress is not None:
        progress(done, total)
    with model.session(n_seq=per_batch, n_ctx=window) as session:
        for batch in _batches(plan, profile, per_batch):
            session.reset()
            tokens = {seq: plan[index].tokens for seq, index in enumerate(batch)}
            sums = session.measure(tokens, profile.layers.tolist(), scores_are_logits=scores_are_logits)
            for row, layer in enumerate(profile.layers):
                check_finite(model.path, int(layer), np.flatnonzero(~np.isfinite(sums.saliency[:, row]).all(axis=0)))
            _add(profile, batch, plan[batch[0]].domain, sums)
            for index in batch:
                profile.n_tokens[index] = len(plan[index].tokens)
                done += len(plan[index].tokens)
            if progress is not None:
                progress(done, total)
            if save_to is not None and time.monotonic() - saved > SAVE_SECONDS:
                profile.facts["seconds"] = time.monotonic() - started
                profile.save(save_to, force=True)
                saved = time.monotonic()


def _batches(plan: list[_Sequence], profile: Profile, per_batch: int) -> list[list[int]]:
    """Indices of sequences that are still to be measured; those of a batch are of one domain."""
    batches: list[list[int]] = []
    for index, sequence in enumerate(plan):
        if profile.n_tokens[index]:
            continue
        if batches and len(batches[-1]) < per_batch and plan[batches[-1][0]].domain == sequence.domain:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _add(profile: Profile, batch: list[int], domain: int, sums: Statistics) -> None:
    """Enter one batch; sequences of a batch are numbered from 0."""
    rows = slice(0, len(batch))
    profile.count[batch] = sums.count[rows]
    profile.mass[batch] = sums.mass[rows]
    profile.saliency[batch] = sums.saliency[rows]
    profile.energy[batch] = sums.energy[rows]
    profile.entropy[batch] = sums.entropy[rows]
    np.maximum(profile.peak[domain], sums.peak, out=profile.peak[domain])
    profile.together[domain] += sums.together
    profile.cosaliency[domain] += sums.cosaliency
