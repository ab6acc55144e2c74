"""Plans: how many experts each node holds, and which; from a profile, or without a measurement."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshard._core import GGUFMap, MoeshardError
from moeshard.arrays import Rows
from moeshard.gguf.identity import ModelIdentity, identify, no_experts
from moeshard.keep.text import Keep, held_range
from moeshard.planning.budget import Memory, Use, default_ctx, fit, largest_keep, shard_memory
from moeshard.planning.deal import group_experts
from moeshard.planning.islands import Begun, islands
from moeshard.planning.options import ISLANDS, SHARED_CORE, IslandsOptions, SharedCoreOptions, check_cover, options_of
from moeshard.planning.plan import PER_LAYER, Plan, PlanNode
from moeshard.planning.strategies import CHOOSING, STRATEGIES, across_layers, shared_core
from moeshard.profile.packed import VALUES, regrouped
from moeshard.profile.ranking import read_ranking
from moeshard.profile.record import Profile
from moeshard.profile.statistics import captured
from moeshard.traffic.embedded import model_name

WHOLE_MEMORY = "whole_memory"
"""Under this key a plan says how many bytes a node with all experts would take."""
STRATEGY_NAMES = (ISLANDS, *STRATEGIES, SHARED_CORE)
PER_LAYER_STRATEGIES = (ISLANDS, *CHOOSING)


def choose_experts(
    profile: Profile,
    sizes: Sequence[int],
    strategy: str = ISLANDS,
    *,
    expert_groups: int = 1,
    fewest: int | None = None,
    begun: Begun | None = None,
    **options: Any,
) -> list[Keep]:
    """Choose the experts of nodes. A pure function, but for `begun`.

    Args:
        profile: of the traffic.
        sizes: experts per layer of each node.
        strategy: one of `STRATEGY_NAMES`; docs/plans.md says what each does.
        expert_groups: into how many groups of experts the model divides each layer (DeepSeek-V3); each node holds
            equally many of every group. 0 or 1: none.
        fewest: layers may hold different numbers of experts, at least so many each; `sizes` are then means over layers.
            None: all layers of a node hold equally many.
        begun: what an earlier call left that differed in `sizes` alone, for `islands` to go on from; new, it is filled.
        options: of the strategy, see `moeshard.planning.options`.

    Returns:
        Per node: bool (n_layer, n_expert); layers that the profile does not cover hold the experts of lowest ids.

    Raises:
        MoeshardError: an unknown strategy, or one that cannot do it; an option of another strategy, or out of range;
            sizes that the model cannot have.
    """
    check_strategy(strategy)
    chosen = options_of(strategy, options)
    groups = max(1, expert_groups)
    n_expert = profile.n_expert
    for size in sizes:
        if not 0 < size <= n_expert or size % groups:
            raise MoeshardError(
                f"a node cannot hold {size} of {n_expert} experts"
                + (f" in {groups} groups of equal size" if groups > 1 else "")
            )
    if fewest is not None:
        _check_per_layer(strategy, groups)
    divided = _regrouped(profile, groups)
    own = [size // groups for size in sizes]
    if isinstance(chosen, IslandsOptions):
        if chosen.cover:
            check_cover(sizes, n_expert)
        nodes = _islands(divided, own, chosen, fewest, begun)
    elif isinstance(chosen, SharedCoreOptions):
        nodes = shared_core(divided, own, chosen.core)
    elif fewest is not None:
        nodes = CHOOSING[strategy](divided, own, partial(across_layers, fewest=fewest))
    else:
        nodes = STRATEGIES[strategy](divided, own)
    return [_whole(rows, profile, size, groups) for rows, size in zip(nodes, sizes, strict=True)]


def check_strategy(strategy: str) -> None:
    """Raise a `MoeshardError` where there is no such strategy."""
    if strategy not in STRATEGY_NAMES:
        raise MoeshardError(f"unknown strategy '{strategy}'; choose from {', '.join(STRATEGY_NAMES)}")


def _islands(
    profile: Profile, sizes: list[int], options: IslandsOptions, fewest: int | None, begun: Begun | None
) -> list[Rows]:
    found = islands(profile, sizes, **vars(options), fewest=fewest, begun=begun).keeps
    if options.cover and not np.logical_or.reduce(found).all():
        raise MoeshardError(
            "option 'cover': not every expert found a place beside those that every node has to hold, in some layer; "
            "give the nodes more room, or leave it out"
        )
    return found


def _check_per_layer(strategy: str, groups: int) -> None:
    if strategy not in PER_LAYER_STRATEGIES:
        raise MoeshardError(
            f"strategy '{strategy}' gives every layer of a node equally many experts; for layers of different size "
            f"(--per-layer) choose from {', '.join(PER_LAYER_STRATEGIES)}"
        )
    if groups > 1:
        raise MoeshardError(
            f"the model chooses among {groups} groups of experts, which are equally large; its layers cannot be of "
            f"different size (--per-layer)"
        )


def make_plan(
    model: str | os.PathLike[str] | GGUFMap,
    profile: Profile,
    *,
    n_keep: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    strategy: str = ISLANDS,
    use: Use | None = None,
    n_expert_used: int | None = None,
    per_layer: bool = False,
    **options: Any,
) -> Plan:
    """Plan nodes for a model.

    Args:
        model: the whole model; its header is read.
        profile: of that model.
        n_keep: experts per layer of each node; or
        budgets: bytes of memory of each node, which is then given as many experts as fit beside the rest of the model,
            its context and intermediate results.
        strategy: see `choose_experts`.
        use: what else takes memory on a node.
        n_expert_used: experts per token on every node; None: as many as the model says.
        per_layer: layers may hold different numbers of experts; `n_keep`, or what fits, is then the mean of a node's.
            Only moeshard loads such shards.
        options: see `choose_experts`.

    Raises:
        MoeshardError: the profile is of another model, or nothing fits; it says why.
    """
    source = model if isinstance(model, GGUFMap) else GGUFMap(model)
    identity = identify(source)
    check_profile(profile, identity, source.path)
    if (n_keep is None) == (budgets is None):
        raise MoeshardError("give either the number of experts or the memory of each node")
    use = use or Use(n_ctx=default_ctx(source))
    layout = source.moe_layout()
    groups = max(1, layout.n_expert_groups)
    fewest = max(n_expert_used or 0, *layout.n_expert_used, groups)
    fewest = -(-fewest // groups) * groups

    @cache
    def memory(size: int) -> Memory:
        return shard_memory(source, size, use, n_expert_used)

    if budgets is not None:
        n_keep = [largest_keep(budget, fewest, layout.n_expert, groups, memory) for budget in budgets]
    assert n_keep is not None
    for size in n_keep:
        if size < fewest:
            raise MoeshardError(f"a node cannot do with {size} experts per layer: a token uses {fewest}")

    begun = Begun()  # what is searched for again, for nodes a little smaller, is searched for from what was found

    def choose(sizes: Sequence[int]) -> list[Keep]:
        return choose_experts(
            profile,
            sizes,
            strategy,
            expert_groups=groups,
            fewest=fewest if per_layer else None,
            begun=begun,
            **options,
        )

    def exact(keep: Keep) -> Memory:
        return shard_memory(source, keep, use, n_expert_used)

    if per_layer:
        n_keep, keeps, memories = fit(n_keep, budgets, fewest, sum(layout.per_expert_bytes), choose, exact)
    else:
        keeps, memories = choose(n_keep), [memory(size) for size in n_keep]
    nodes = []
    for index, keep in enumerate(keeps):
        facts = _facts(profile, keep, memories[index])
        if per_layer:
            facts["experts"] = dict(zip(("fewest", "most"), held_range(keep, identity.moe_layers), strict=True))
        if budgets is not None:
            facts["budget"] = budgets[index]
        nodes.append(PlanNode(f"node-{index}", keep, n_expert_used, facts))
    parameters = {
        "n_keep": list(n_keep),
        "domains": profile.domains,
        "texts": profile.facts.get("texts"),
        **vars(use),
        **vars(options_of(strategy, options)),
    }
    if per_layer:
        parameters[PER_LAYER] = True
    extra: dict[str, Any] = {WHOLE_MEMORY: memory(layout.n_expert).total}
    extra |= {key: profile.facts[key] for key in ("sketches",) if key in profile.facts}
    return Plan(nodes, strategy, parameters, replace(identity, facts={"path": model_name(source.path)}), extra)


def _facts(profile: Profile, keep: Keep, memory: Memory) -> dict[str, Any]:
    return {
        "memory": {**vars(memory), "total": memory.total},
        "captured": {name: round(captured(profile, keep, [name]), 4) for name in profile.domains},
    }


def plan_groups(
    model: str | os.PathLike[str] | GGUFMap,
    n_groups: int,
    mode: str = "contiguous",
    *,
    ranking: str | os.PathLike[str] | None = None,
    replicate: int = 0,
    n_expert_used: int | None = None,
) -> Plan:
    """Deal the experts of every layer out to groups that together hold all of them.

    Args:
        model: a GGUF file; its header is read.
        n_groups: how many groups, at least 1.
        mode: ``contiguous``, ``balanced``, ``tiers`` or ``snake``; see docs/plans.md.
        ranking: a CSV or profile with a score per layer and expert; `read_ranking` says more.
        replicate: so many of the best experts of each layer are in every group.
        n_expert_used: experts per token on every node; None: as many as the model says.

    Raises:
        MoeshardError: the model is dense, the mode needs a ranking or would not use it, or the ranking does not fit
            the model.
    """
    if mode == "contiguous" and ranking is not None and not replicate:
        raise MoeshardError(
            "contiguous groups are ranges of ids and use no ranking; leave out --ranking (ranking), or choose --mode "
            "balanced, tiers or snake"
        )
    source = model if isinstance(model, GGUFMap) else GGUFMap(model)
    identity = identify(source)
    if not identity.moe_layers:
        raise no_experts(source.path, identity)
    shape = (identity.n_layer, identity.n_expert, identity.moe_layers)
    keeps = group_experts(
        mode,
        n_groups,
        *shape,
        ranking=None if ranking is None else read_ranking(ranking, *shape),
        replicate=replicate,
        expert_groups=source.moe_layout().n_expert_groups,
    )
    parameters: dict[str, Any] = {"groups": n_groups, "replicate": replicate}
    if ranking is not None:
        parameters["ranking"] = os.path.basename(os.fspath(ranking))
    nodes = [PlanNode(f"group-{i}", keep, n_expert_used) for i, keep in enumerate(keeps)]
    return Plan(nodes, mode, parameters, identity)


def check_profile(profile: Profile, identity: ModelIdentity, path: str) -> None:
    """Raise a `MoeshardError` where a profile is not of this model, which lies in `path`."""
    if not profile.model.is_same(identity):
        raise MoeshardError(f"the profile is of {profile.model}, not of {path}: {identity}; analyze this model")


def _regrouped(profile: Profile, groups: int) -> Profile:
    """The same profile with each group of experts as a layer of its own."""
    if groups == 1:
        return profile
    _, n_rows, n_expert = profile.count.shape
    size = n_expert // groups
    n_domain = len(profile.domains)

    def within(pairs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        blocks = pairs.reshape(n_domain, n_rows, groups, size, groups, size)
        diagonal: npt.NDArray[Any] = np.einsum("dmgagb->dmgab", blocks).reshape(n_domain, n_rows * groups, size, size)
        return diagonal

    return replace(
        profile,
        model=replace(profile.model, n_expert=size),
        layers=np.repeat(profile.layers, groups),
        **regrouped({name: getattr(profile, name) for name in VALUES}, groups),
        entropy=np.repeat(profile.entropy, groups, axis=1),
        peak=profile.peak.reshape(n_domain, n_rows * groups, size),
        together=within(profile.together),
        cosaliency=within(profile.cosaliency),
    )


def _whole(rows: Rows, profile: Profile, size: int, groups: int) -> Keep:
    """Rows of the profile's layers, groups side by side again, as a keep of the model."""
    lowest = np.zeros((groups, profile.n_expert // groups), dtype=bool)
    lowest[:, : size // groups] = True
    keep = np.ones((profile.model.n_layer, profile.n_expert), dtype=bool)
    keep[profile.model.moe_layers] = lowest.ravel()
    keep[profile.layers] = rows.reshape(profile.layers.size, profile.n_expert)
    return keep
