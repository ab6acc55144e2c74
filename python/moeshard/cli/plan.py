"""`moeshard plan`: which node holds which experts?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeshard.cli.options import ForceOption, JsonOption, ModelArgument, one_of, parse_size

if TYPE_CHECKING:
    from moeshard import Plan


def plan(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan to write, a JSON file; '-' for stdout.")],
    profile: Annotated[Path, typer.Option(help="What `moeshard analyze` measured.")],
    groups: Annotated[int | None, typer.Option(min=1, help="So many nodes, each with --keep experts.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Experts per layer of each node.")] = None,
    nodes: Annotated[
        str | None, typer.Option(help="Memory of each node, such as 24GiB,64GiB; each is given what fits.")
    ] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="islands, ranked, reap: --keep, or what fits, is the mean over a node's layers; those that need more "
            "hold more. Only moeshard loads such shards.",
        ),
    ] = False,
    strategy: Annotated[
        str,
        typer.Option(
            **one_of("moeshard.planning.planner:STRATEGY_NAMES"),
            help="islands, contiguous, balanced, ranked, snake, shared-core, reap or coactivation.",
        ),
    ] = "islands",
    ctx: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="what the model was trained on, at most 4096",
            help="Tokens of context that a node has room for, per sequence.",
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Sequences at once on a node.")] = 1,
    experts_used: Annotated[
        int | None, typer.Option(min=1, show_default="as the model", help="Experts per token on every node.")
    ] = None,
    cover: Annotated[bool, typer.Option("--cover", help="islands: every expert lives on some node.")] = False,
    restarts: Annotated[
        int | None,
        typer.Option(show_default="16", help="islands: random beginnings, of which the best counts."),
    ] = None,
    shrinkage: Annotated[
        float | None,
        typer.Option(show_default="0.1", help="islands: how far nodes are drawn to what all traffic needs, 0 to 1."),
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default="0", help="islands: of these beginnings.")] = None,
    core: Annotated[
        float | None,
        typer.Option(show_default="0.5", help="shared-core: part of a node that is the same everywhere, 0 to 1."),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose the experts of each node by a profile, and say what each captures of the traffic.

    No model is run and no weight is read. `moeshard split --plan` writes the shards.
    """
    if (nodes is None) == (groups is None or keep is None) or (nodes is not None and (groups or keep)):
        raise typer.BadParameter("give either --groups with --keep, or --nodes")

    from moeshard import GGUFMap, MoeshardError
    from moeshard.cli.files import STDOUT, Results, check_files, files_read
    from moeshard.cli.terminal import print_json
    from moeshard.files.provenance import MADE, stamp
    from moeshard.planning.budget import Use, default_ctx
    from moeshard.planning.options import options_of
    from moeshard.planning.planner import check_strategy, make_plan
    from moeshard.profile.record import read_profile
    from moeshard.traffic.embedded import resolve_model

    given = {"cover": cover or None, "restarts": restarts, "shrinkage": shrinkage, "seed": seed, "core": core}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        check_strategy(strategy)
        options_of(strategy, options)
    except MoeshardError as error:
        raise typer.BadParameter(str(error)) from error
    check_files(out, inputs=files_read(model, profile), force=force, as_json=as_json)
    results = Results(force=force)
    path = resolve_model(model)
    made = make_plan(
        path,
        read_profile(profile),
        n_keep=None if groups is None or keep is None else [keep] * groups,
        budgets=None if nodes is None else [parse_size(part) for part in nodes.split(",")],
        strategy=strategy,
        use=Use(n_ctx=ctx or default_ctx(GGUFMap(path)), n_seq=parallel),
        n_expert_used=experts_used,
        per_layer=per_layer,
        **options,
    )
    made.extra[MADE] = stamp(sys.argv[1:])
    results.write(out, made.to_json())
    if as_json:
        print_json(
            {"plan": str(out), "strategy": strategy, "nodes": [_facts(made, index) for index in range(len(made.nodes))]}
        )
    elif out != STDOUT:
        _report(made, model, out)
    if out != STDOUT:
        _say_what_fits(made)
    results.finish()


def _facts(made: Plan, index: int) -> dict[str, Any]:
    node = made.nodes[index]
    return {"name": node.name, "n_expert": made.parameters["n_keep"][index], **node.facts}


def _held(facts: dict[str, Any], n_expert: int) -> str:
    from moeshard.cli.output import span

    held = facts.get("experts")
    return f"{facts['n_expert']} of {n_expert}" if held is None else span(held["fewest"], held["most"])


def _say_what_fits(made: Plan) -> None:
    """Tell who has the memory for the whole model that there is nothing to divide."""
    from moeshard.cli.terminal import warn

    whole = [node.name for node in made.nodes if "budget" in node.facts and node.keep[made.model.moe_layers].all()]
    if whole and len(whole) == len(made.nodes):
        warn("the whole model fits, no plan is needed: every node can run it as it is")
    elif whole:
        warn(f"the whole model fits on {', '.join(whole)}, which can run it as it is")


def _report(made: Plan, model: str, out: Path) -> None:
    from moeshard.cli.output import plain_table, show
    from moeshard.cli.terminal import command, note
    from moeshard.sizes import size

    domains = list(made.nodes[0].facts["captured"])
    table = plain_table("What each node holds, and its share of each domain's saliency")
    table.add_column("node")
    for header in ("experts", "memory", *domains):
        table.add_column(header, justify="right", no_wrap=True)
    for index, node in enumerate(made.nodes):
        facts = _facts(made, index)
        shares = [f"{facts['captured'][name]:.0%}" for name in domains]
        table.add_row(node.name, _held(facts, made.model.n_expert), size(facts["memory"]["total"]), *shares)
    show(table)
    split = command("moeshard", "split", model, "-o", "shards", "--plan", out)
    note(f"{made.strategy}; {out}; write the shards with: {split}")
