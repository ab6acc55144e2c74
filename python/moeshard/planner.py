"""Plans from a profile: how many experts each node holds, and which."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from moeshard._core import GGUFMap, MoeshardError
from moeshard.budget import Memory, Use, largest_keep, shard_memory
from moeshard.embedded import model_name
from moeshard.fingerprint import identify
from moeshard.islands import islands
from moeshard.keep import Keep
from moeshard.plan import ModelIdentity, Plan, PlanNode
from moeshard.profile import Profile
from moeshard.strategies import STRATEGIES, Rows

ISLANDS = "islands"
STRATEGY_NAMES = (ISLANDS, *STRATEGIES)


def choose_experts(
    profile: Profile,
    sizes: Sequence[int],
    strategy: str = ISLANDS,
    *,
    expert_groups: int = 1,
    **options: Any,
) -> list[Keep]:
    """Choose the experts of nodes. A pure function.

    Args:
        profile: of the traffic.
        sizes: experts per layer of each node.
        strategy: one of `STRATEGY_NAMES`; docs/plans.md says what each does.
        expert_groups: into how many groups of experts the model divides each layer (DeepSeek-V3); each node holds
            equally many of every group. 0 or 1: none.
        options: of `moeshard.islands.islands` for that strategy; ``core`` for ``shared-core``.

    Returns:
        Per node: bool (n_layer, n_expert); layers that the profile does not cover hold the experts of lowest ids.

    Raises:
        MoeshardError: an unknown strategy, or sizes that the model cannot have.
    """
    if strategy not in STRATEGY_NAMES:
        raise MoeshardError(f"unknown strategy '{strategy}'; choose from {', '.join(STRATEGY_NAMES)}")
    groups = max(1, expert_groups)
    n_expert = profile.n_expert
    for size in sizes:
        if not 0 < size <= n_expert or size % groups:
            raise MoeshardError(
                f"a node cannot hold {size} of {n_expert} experts"
                + (f" in {groups} groups of equal size" if groups > 1 else "")
            )
    divided = _regrouped(profile, groups)
    own = [size // groups for size in sizes]
    if strategy == ISLANDS:
        chosen = islands(divided, own, **options).keeps
    else:
        chosen = STRATEGIES[strategy](divided, own, **options)
    return [_whole(rows, profile, size, groups) for rows, size in zip(chosen, sizes, strict=True)]


def make_plan(
    model: str | os.PathLike[str] | GGUFMap,
    profile: Profile,
    *,
    n_keep: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    strategy: str = ISLANDS,
    use: Use | None = None,
    n_expert_used: int | None = None,
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
        options: see `choose_experts`.

    Raises:
        MoeshardError: the profile is of another model, or nothing fits; it says why.
    """
    source = model if isinstance(model, GGUFMap) else GGUFMap(model)
    identity = identify(source)
    check_profile(profile, identity, source.path)
    if (n_keep is None) == (budgets is None):
        raise MoeshardError("give either the number of experts or the memory of each node")
    use = use or Use()
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
    keeps = choose_experts(profile, n_keep, strategy, expert_groups=groups, **options)
    nodes = []
    for index, keep in enumerate(keeps):
        facts = _facts(profile, keep, memory(n_keep[index]))
        if budgets is not None:
            facts["budget"] = budgets[index]
        nodes.append(PlanNode(f"node-{index}", keep, n_expert_used, facts))
    parameters = {
        "n_keep": list(n_keep),
        "domains": profile.domains,
        "texts": profile.facts.get("texts"),
        **vars(use),
        **options,
    }
    return Plan(nodes, strategy, parameters, replace(identity, facts={"path": model_name(source.path)}))


def captured(profile: Profile, keep: Keep, domains: Sequence[str] | None = None) -> float:
    """Return the share of the saliency of some domains that a keep holds, mean over layers; 0 to 1."""
    total = profile.total("saliency", domains)
    share = total / np.maximum(total.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return float((share * keep[profile.layers]).sum(axis=1).mean())


def _facts(profile: Profile, keep: Keep, memory: Memory) -> dict[str, Any]:
    return {
        "memory": {**vars(memory), "total": memory.total},
        "captured": {name: round(captured(profile, keep, [name]), 4) for name in profile.domains},
    }


def check_profile(profile: Profile, identity: ModelIdentity, path: str) -> None:
    """Raise a `MoeshardError` where a profile is not of this model, which lies in `path`."""
    if profile.model != identity:
        raise MoeshardError(f"the profile is of {profile.model}, not of {path}: {identity}; analyze this model")


def _regrouped(profile: Profile, groups: int) -> Profile:
    """The same profile with each group of experts as a layer of its own."""
    if groups == 1:
        return profile
    n_seq, n_rows, n_expert = profile.count.shape
    size = n_expert // groups
    n_domain = len(profile.domains)
    blocks = profile.together.reshape(n_domain, n_rows, groups, size, groups, size)
    return Profile(
        replace(profile.model, n_expert=size),
        profile.domains,
        np.repeat(profile.layers, groups),
        profile.domain,
        profile.n_tokens,
        profile.count.reshape(n_seq, n_rows * groups, size),
        profile.mass.reshape(n_seq, n_rows * groups, size),
        profile.saliency.reshape(n_seq, n_rows * groups, size),
        np.repeat(profile.entropy, groups, axis=1),
        profile.peak.reshape(n_domain, n_rows * groups, size),
        np.einsum("dmgagb->dmgab", blocks).reshape(n_domain, n_rows * groups, size, size),
        profile.facts,
    )


def _whole(rows: Rows, profile: Profile, size: int, groups: int) -> Keep:
    """Rows of the profile's layers, groups side by side again, as a keep of the model."""
    lowest = np.zeros((groups, profile.n_expert // groups), dtype=bool)
    lowest[:, : size // groups] = True
    keep = np.ones((profile.model.n_layer, profile.n_expert), dtype=bool)
    keep[profile.model.moe_layers] = lowest.ravel()
    keep[profile.layers] = rows.reshape(profile.layers.size, profile.n_expert)
    return keep
