"""moeshard: know which experts of a Mixture-of-Experts model your traffic needs, and run it with only those.

>>> import moeshard
>>> model = moeshard.Model(moeshard.embedded_model())
>>> keep = model.keep("0-63")  # bool (n_layer, n_expert)
>>> print("".join(model.generate("Once upon a time", keep=keep)))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Names are looked up when first used: `import moeshard` costs next to nothing, and a command line that only prints its
# help never loads the native library.
_HOME = {
    "Curve": "moeshard.evaluation.curve",
    "Domain": "moeshard.traffic.domains",
    "Evaluation": "moeshard.evaluation.record",
    "GGUFMap": "moeshard._core",
    "Generation": "moeshard.runtime.generation",
    "Model": "moeshard.runtime.model",
    "MoeshardError": "moeshard._core",
    "Placed": "moeshard.placement.decision",
    "Placement": "moeshard.placement.placement",
    "Plan": "moeshard.planning.plan",
    "PlanNode": "moeshard.planning.plan",
    "Profile": "moeshard.profile.record",
    "Ranking": "moeshard.profile.ranking",
    "Recovered": "moeshard.recovery.recover",
    "Session": "moeshard.runtime.session",
    "ShardFile": "moeshard.shards.split",
    "Trace": "moeshard.runtime.trace",
    "TraceChunk": "moeshard.runtime.trace",
    "analyze": "moeshard.profile.measure",
    "balanced_keep": "moeshard.keep.balance",
    "cmake_dir": "moeshard.paths",
    "embedded_model": "moeshard.traffic.embedded",
    "embedded_text": "moeshard.traffic.embedded",
    "embedded_traffic": "moeshard.traffic.domains",
    "evaluate": "moeshard.evaluation.evaluate",
    "format_keep": "moeshard.keep.text",
    "group_experts": "moeshard.planning.deal",
    "include_dir": "moeshard.paths",
    "make_plan": "moeshard.planning.planner",
    "measure_curve": "moeshard.evaluation.curve",
    "merge": "moeshard.shards.merge",
    "parse_keep": "moeshard.keep.text",
    "plan_groups": "moeshard.planning.planner",
    "read_curve": "moeshard.evaluation.curve",
    "read_evaluation": "moeshard.evaluation.record",
    "read_plan": "moeshard.planning.plan",
    "read_profile": "moeshard.profile.record",
    "read_ranking": "moeshard.profile.ranking",
    "read_texts": "moeshard.traffic.domains",
    "recover": "moeshard.recovery.recover",
    "split": "moeshard.shards.split",
    "verify": "moeshard.shards.verify",
    "write_ranking": "moeshard.profile.ranking",
}

if TYPE_CHECKING:
    from moeshard._core import GGUFMap, MoeshardError
    from moeshard.evaluation.curve import Curve, measure_curve, read_curve
    from moeshard.evaluation.evaluate import evaluate
    from moeshard.evaluation.record import Evaluation, read_evaluation
    from moeshard.keep.balance import balanced_keep
    from moeshard.keep.text import format_keep, parse_keep
    from moeshard.paths import cmake_dir, include_dir
    from moeshard.placement.decision import Placed
    from moeshard.placement.placement import Placement
    from moeshard.planning.deal import group_experts
    from moeshard.planning.plan import Plan, PlanNode, read_plan
    from moeshard.planning.planner import make_plan, plan_groups
    from moeshard.profile.measure import analyze
    from moeshard.profile.ranking import Ranking, read_ranking, write_ranking
    from moeshard.profile.record import Profile, read_profile
    from moeshard.recovery.recover import Recovered, recover
    from moeshard.runtime.generation import Generation
    from moeshard.runtime.model import Model
    from moeshard.runtime.session import Session
    from moeshard.runtime.trace import Trace, TraceChunk
    from moeshard.shards.merge import merge
    from moeshard.shards.split import ShardFile, split
    from moeshard.shards.verify import verify
    from moeshard.traffic.domains import Domain, embedded_traffic, read_texts
    from moeshard.traffic.embedded import embedded_model, embedded_text

__all__ = [
    "Curve",
    "Domain",
    "Evaluation",
    "GGUFMap",
    "Generation",
    "Model",
    "MoeshardError",
    "Placed",
    "Placement",
    "Plan",
    "PlanNode",
    "Profile",
    "Ranking",
    "Recovered",
    "Session",
    "ShardFile",
    "Trace",
    "TraceChunk",
    "__version__",
    "analyze",
    "balanced_keep",
    "cmake_dir",
    "embedded_model",
    "embedded_text",
    "embedded_traffic",
    "evaluate",
    "format_keep",
    "group_experts",
    "include_dir",
    "make_plan",
    "measure_curve",
    "merge",
    "parse_keep",
    "plan_groups",
    "read_curve",
    "read_evaluation",
    "read_plan",
    "read_profile",
    "read_ranking",
    "read_texts",
    "recover",
    "split",
    "verify",
    "write_ranking",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("moeshard")
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'moeshard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
