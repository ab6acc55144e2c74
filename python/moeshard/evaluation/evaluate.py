"""Evaluating a plan: what its nodes lose on text that they were not chosen by, and how well sessions are placed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moeshard._core import MoeshardError
from moeshard.evaluation.alarms import learn_alarms
from moeshard.evaluation.loops import N_ANSWERS, N_TOKENS, Loops, Prompt, measure_loops
from moeshard.evaluation.losses import PROMPT, Losses, measure_losses
from moeshard.evaluation.record import Evaluation, GroupScores, ProbeScores, Settings
from moeshard.evaluation.scores import Scorer, check_windows
from moeshard.gguf.corrections import open_corrections
from moeshard.placement.nodes import NodeModel, plan_nodes, recoveries
from moeshard.placement.probes import PROBES, Probe
from moeshard.planning.plan import Plan, read_plan
from moeshard.profile.intervals import CONFIDENCE, FEWEST
from moeshard.progress import StageProgress
from moeshard.runtime.answers import Sampling
from moeshard.traffic.domains import Domain, embedded_traffic
from moeshard.traffic.likeness import Likeness, likeness
from moeshard.traffic.windows import WINDOW, cut_windows

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

N_WINDOWS = 16
_GENERATED_TOKEN = 3
"""What generating a token costs, about, of what reading one does: for the progress only."""


def evaluate(
    model: Model | str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str],
    domains: Sequence[Domain] | None = None,
    *,
    shards: str | os.PathLike[str] | None = None,
    recovery: str | os.PathLike[str] | None = None,
    probe: Probe = "both",
    n_windows: int | None = N_WINDOWS,
    window: int = WINDOW,
    n_prompt: int = PROMPT,
    n_answers: int = N_ANSWERS,
    n_tokens: int = N_TOKENS,
    sampling: Sampling | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    progress: StageProgress | None = None,
) -> Evaluation:
    """Measure what the nodes of a plan lose against the whole model, and how well a probe places sessions on them.

    Args:
        model: the whole model, or its file.
        plan: of that model, or its file. Nodes with their own number of experts per token use it; the whole model
            keeps its own.
        domains: text that the plan was not made from; None: the embedded held-out texts.
        shards: folder of the plan's shards, to be run instead of masks on the model.
        recovery: folder of the plan's recoveries: nodes are run as their corrected shards, without files of these.
        probe: what places sessions by their prompts, ``both``, ``loss`` or ``saliency``; see `Losses.placement`.
        n_windows: per domain, evenly spread over its text; None: all.
        window: tokens predicted in each.
        n_prompt: of them, so many are the prompt and are not scored.
        n_answers: per domain and node, to look for degenerate loops in; 0: none.
        n_tokens: of each answer.
        sampling: how answers are drawn.
        confidence: of all intervals.
        seed: the first one of the answers.
        progress: see `StageProgress`.

    Raises:
        MoeshardError: the plan is for another model, a shard is not what the plan says, a text has fewer than
            four windows, or an argument is out of range.
    """
    from moeshard.runtime.model import Model

    if probe not in PROBES:
        raise MoeshardError(f"unknown probe '{probe}'; choose from {', '.join(PROBES)}")
    if n_answers < 0 or n_tokens < 1 or (n_windows is not None and n_windows < FEWEST):
        raise MoeshardError(
            f"n_answers must not be negative, n_tokens be at least 1 and n_windows at least {FEWEST}: got {n_answers}, "
            f"{n_tokens} and {n_windows}"
        )
    loaded = model if isinstance(model, Model) else Model(model)
    planned = plan if isinstance(plan, Plan) else read_plan(plan)
    texts = embedded_traffic("heldout") if domains is None else list(domains)
    nodes = plan_nodes(loaded, planned, shards, recovery=recovery)

    windows, owners = cut_windows(loaded, texts, window, n_windows)
    check_windows([domain.name for domain in texts], owners, window)

    reading = len(windows) * window * (1 + len(nodes))
    writing = len(texts) * n_answers * (2 + len(nodes)) * (n_prompt + _GENERATED_TOKEN * n_tokens)
    part = reading / (reading + writing)

    def read(done: int, total: int) -> None:
        if progress is not None:
            progress("reading", part * done / total)

    def wrote(done: int, total: int) -> None:
        if progress is not None:
            progress("writing answers", part + (1 - part) * done / total)

    losses = measure_losses(
        loaded,
        [node.keep for node in planned.nodes],
        texts,
        nodes=nodes,
        n_windows=n_windows,
        window=window,
        n_prompt=n_prompt,
        progress=read,
    )
    scorer = Scorer(losses, confidence=confidence)
    where = losses.placement(probe)
    loops: Loops | None = None
    if n_answers:
        loops = measure_loops(
            loaded,
            {node.name: own for node, own in zip(planned.nodes, nodes, strict=True)},
            [
                Prompt(texts[owner].name, tokens[:n_prompt], int(index))
                for owner, tokens, index in zip(owners, windows, where, strict=True)
            ],
            n_answers=n_answers,
            n_tokens=n_tokens,
            sampling=sampling,
            seed=seed,
            confidence=confidence,
            progress=wrote,
        )
    shares = {node.name: losses.mean((where == index).astype(np.float64)) for index, node in enumerate(planned.nodes)}
    return Evaluation(
        model=planned.model,
        plan_file="" if isinstance(plan, Plan) else os.fspath(plan),
        strategy=planned.strategy,
        parameters=planned.parameters,
        settings=Settings(
            window=window,
            prompt=n_prompt,
            windows={name: int((losses.domain == index).sum()) for index, name in enumerate(losses.domains)},
            texts={domain.name: domain.digest for domain in texts},
            likeness=text_likeness(loaded, texts, planned, recovery),
            confidence=confidence,
            seed=seed,
            shards=None if shards is None else os.fspath(shards),
            recovery=None if recovery is None else os.fspath(recovery),
            n_expert_used=_used(loaded, nodes),
        ),
        domains=losses.domains,
        full=scorer.full(),
        groups=[
            GroupScores(node.name, scorer.group(index), losses.mean(losses.captured[index]))
            for index, node in enumerate(planned.nodes)
        ],
        hashed=scorer.hashed(),
        placed=scorer.placed(where),
        probe=probe,
        share=shares,
        oracle=scorer.placed(losses.placement("oracle")),
        probes={name: _judge(losses, scorer, name) for name in PROBES},
        loops=loops,
        alarms=learn_alarms(losses, [node.name for node in planned.nodes]),
    )


def text_likeness(
    model: Model, domains: Sequence[Domain], plan: Plan, recovery: str | os.PathLike[str] | None = None
) -> Likeness:
    """Return how text relates to that by which a plan's experts were chosen, and to which they were fitted."""
    found = likeness(domains, plan.parameters.get("texts"), plan.extra.get("sketches"))
    if recovery is None:
        return found
    # The recoveries of a plan are made from one text.
    document = open_corrections(recoveries(model, plan, recovery)[0]).document
    fitted = likeness(domains, document.get("texts"), document.get("sketches"))
    seen = [domain.name for domain in domains if domain.name in {*found.seen, *fitted.seen}]
    near = {name: share for name, share in {**fitted.near, **found.near}.items() if name not in seen}
    return replace(found, seen=seen, near=near)


def _used(model: Model, nodes: Sequence[NodeModel]) -> dict[str, int | list[int]]:
    return {"full": model.n_expert_used, "nodes": [node.model.n_expert_used for node in nodes]}


def _judge(losses: Losses, scorer: Scorer, probe: str) -> ProbeScores:
    node = losses.placement(probe)
    nll = losses.mean(losses.placed_losses(node))
    return ProbeScores(nll, nll - losses.mean(losses.full_loss()), scorer.right(node), *scorer.regret(node))
