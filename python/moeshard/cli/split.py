"""`moeshard split`: a model's experts, dealt out to files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeshard.cli.options import (
    ForceOption,
    JobsOption,
    JsonOption,
    MaxFileSizeOption,
    ModelArgument,
    one_of,
)

if TYPE_CHECKING:
    from moeshard import Plan
    from moeshard._core import GGUFMap
    from moeshard.keep.text import Keep
    from moeshard.shards.split import ShardFile


def split(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to; with --keep, the file.")],
    groups: Annotated[int | None, typer.Option(min=1, help="Deal the experts out to so many shards.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            **one_of("moeshard.planning.deal:MODES"),
            show_default="contiguous",
            help="How: contiguous, balanced, tiers or snake. The last two need --ranking.",
        ),
    ] = None,
    ranking: Annotated[
        Path | None, typer.Option(help="What experts are worth: CSV 'layer,expert,score', or a profile.")
    ] = None,
    replicate: Annotated[int, typer.Option(min=0, help="So many best experts of each layer are in every shard.")] = 0,
    keep: Annotated[
        str | None,
        typer.Option(help="One shard of these experts: '0-63,70' for every layer, or a file with a line per layer."),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance", help="Change --keep as little as makes all layers (and expert groups) hold equally many."
        ),
    ] = False,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Layers of --keep (or of a plan that was not made so) may hold different numbers of experts. Such a "
            "shard is loaded by moeshard only.",
        ),
    ] = False,
    plan: Annotated[Path | None, typer.Option(help="The shards that a plan file describes.")] = None,
    only: Annotated[int | None, typer.Option(min=0, help="Write this shard alone, counted from 0.")] = None,
    experts_used: Annotated[
        int | None, typer.Option(min=1, show_default="as the model", help="Experts per token that the shards ask for.")
    ] = None,
    clamp: Annotated[
        bool, typer.Option("--clamp", help="Where fewer experts are held than a token uses, use those.")
    ] = False,
    trunk_once: Annotated[
        bool,
        typer.Option(
            "--trunk-once", help="Write what all shards share once, as trunk.gguf, and files of experts beside it."
        ),
    ] = False,
    recovery: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With --plan: shards with the experts that `moeshard recover` corrected in this folder."
        ),
    ] = None,
    with_router: Annotated[
        bool,
        typer.Option(
            "--with-router",
            help="Write the whole routers into the shards' metadata: who runs one can then measure what it misses.",
        ),
    ] = False,
    max_file_size: MaxFileSizeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    jobs: JobsOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write shards: the model with some of its experts, as GGUF files that any llama.cpp loads.

    Give --groups, --keep or --plan. A folder of shards also gets plan.json, which says what each of them holds.
    """
    if sum(option is not None for option in (groups, keep, plan)) != 1:
        raise typer.BadParameter("give one of --groups, --keep and --plan")
    if groups is None and (mode is not None or ranking is not None or replicate):
        raise typer.BadParameter("--mode, --ranking and --replicate go with --groups")
    if keep is not None and (trunk_once or only is not None):
        raise typer.BadParameter("--keep makes one file: --trunk-once and --only go with --groups or --plan")
    if balance and keep is None:
        raise typer.BadParameter("--balance goes with --keep: groups and plans are balanced already")
    if per_layer and (balance or groups is not None):
        raise typer.BadParameter("--per-layer goes with --keep without --balance, or with --plan")
    if recovery is not None and plan is None:
        raise typer.BadParameter("--recovery goes with --plan, which says whose experts were corrected")
    if plan is not None and experts_used is not None:
        raise typer.BadParameter("--experts-used goes with --groups or --keep: a plan says it for each node")

    from moeshard import split as write_shards
    from moeshard._core import GGUFMap
    from moeshard.cli.files import files_read, no_stdout
    from moeshard.cli.output import progress
    from moeshard.cli.terminal import print_json
    from moeshard.planning.plan import read_plan
    from moeshard.planning.planner import plan_groups
    from moeshard.traffic.embedded import resolve_model

    no_stdout(out, "shards")
    source = GGUFMap(resolve_model(model))
    wanted: Plan | None = None
    if plan is not None:
        wanted = read_plan(plan)
    elif groups is not None:
        wanted = plan_groups(
            source, groups, mode or "contiguous", ranking=ranking, replicate=replicate, n_expert_used=experts_used
        )
    keep_file = Path(keep) if keep is not None and os.path.isfile(keep) else None

    start = time.monotonic()
    with progress() as update:
        written = write_shards(
            source,
            wanted if wanted is not None else _read_keep(source, str(keep), balance),
            out,
            n_expert_used=None if wanted is not None else experts_used,
            clamp=clamp,
            per_layer=per_layer,
            trunk_once=trunk_once,
            recovery=recovery,
            with_router=with_router,
            max_file_size=max_file_size,
            only=only,
            write_plan=wanted is not None,
            inputs=files_read(None, plan, ranking, keep_file),
            dry_run=dry_run,
            force=force,
            jobs=jobs,
            progress=lambda done, total: update("writing", done / max(total, 1)),
        )
    seconds = time.monotonic() - start
    if as_json:
        print_json(
            {
                "model": source.path,
                "dry_run": dry_run,
                "plan": None if wanted is None or dry_run else str(_plan_path(out)),
                "bytes": sum(shard.bytes for shard in written),
                "seconds": None if dry_run else seconds,
                "shards": [vars(shard) for shard in written],
            }
        )
    else:
        _report(source, written, seconds, dry_run)


def _read_keep(source: GGUFMap, text: str, balance: bool) -> Keep:
    from moeshard import balanced_keep, parse_keep
    from moeshard.cli.terminal import note
    from moeshard.keep.text import expert_layers

    layout = source.moe_layout()
    layers = expert_layers(layout)
    keep = parse_keep(text, layout.n_layer, layout.n_expert, moe_layers=layers)
    if not balance:
        return keep
    nearest = balanced_keep(keep, layers, expert_groups=layout.n_expert_groups, n_used=max(layout.n_expert_used))
    dropped, added = int((keep & ~nearest).sum()), int((nearest & ~keep).sum())
    note(f"balanced: {dropped} experts dropped, {added} added")
    return nearest


def _plan_path(out: Path) -> Path:
    from moeshard.shards.split import PLAN_FILE

    return out / PLAN_FILE


def _report(source: GGUFMap, written: list[ShardFile], seconds: float, dry_run: bool) -> None:
    from moeshard.cli.output import plain_table, show, span
    from moeshard.cli.terminal import note
    from moeshard.sizes import size

    whole = sum(part.size for part in source.parts)
    n_expert = source.moe_layout().n_expert
    table = plain_table()
    table.add_column("file", overflow="fold")
    for header in ("experts", "bytes", "of the model"):
        table.add_column(header, justify="right", no_wrap=True)
    for shard in written:
        first, *others = shard.paths
        name = first if not others else f"{first} and {len(others)} more"
        experts = f"{span(shard.n_expert_fewest, shard.n_expert)} of {n_expert}" if shard.n_expert else ""
        table.add_row(name, experts, size(shard.bytes), f"{shard.bytes / whole:.0%}")
    show(table)
    total = sum(shard.bytes for shard in written)
    if dry_run:
        note(f"{size(total)} in {_count(written)}; nothing was written")
    else:
        speed = f"{size(total / max(seconds, 1e-9))}/s"
        note(f"{size(total)} in {_count(written)}, {seconds:.1f} s, {speed}")


def _count(written: list[ShardFile]) -> str:
    n = sum(len(shard.paths) for shard in written)
    return f"{n} file" if n == 1 else f"{n} files"
