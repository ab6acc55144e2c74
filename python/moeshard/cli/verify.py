"""`moeshard verify`: is a shard what it says it is?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeshard.cli.options import JsonOption

if TYPE_CHECKING:
    from moeshard.shards.logits import LogitCheck


def verify(
    shard: Annotated[Path, typer.Argument(show_default=False, help="A shard, a trunk or a file of experts.")],
    source: Annotated[str, typer.Option(help="The model it was taken from ('tinymoe': the embedded one).")],
    recovery: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare its corrected tensors with this recovery.")
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Run both too: the shard must compute what the masked model does.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads for --logits; 0: one per processor.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare every byte of a shard with the model it was taken from.

    The exit code is 0 if all is equal; else the first difference is named.
    """
    from moeshard import MoeshardError
    from moeshard import verify as check
    from moeshard.cli.output import progress, span
    from moeshard.cli.terminal import print_json, say
    from moeshard.sizes import size
    from moeshard.traffic.embedded import resolve_model

    with progress() as update:
        found = check(
            shard,
            resolve_model(source),
            recovery=recovery,
            logits=logits,
            n_threads=threads,
            progress=lambda done, total: update("comparing", done / max(total, 1)),
        )
    if as_json:
        print_json(asdict(found))
    else:
        experts = f"{span(found.n_expert_fewest, found.n_expert)} of {found.n_expert_source} experts per layer"
        held = f", {experts}" if found.n_expert else ""
        but = f" but {len(found.corrected)} corrected tensors" if found.corrected else ""
        say(f"{found.path}: a {found.kind} of {source}{held}: all {size(found.bytes)}{but} are the model's own")
        if found.corrected:
            say(f"corrected, as the recovery made them: {', '.join(found.corrected)}")
        if found.logits is not None:
            for line in lines(found.logits):
                say(line)
    if found.logits is not None and not found.logits.agrees:
        raise MoeshardError(
            f"{found.path}: does not compute what the masked model does: {found.logits.problem}; this is a fault of "
            "moeshard, please report it with the architecture and the keep"
        )


def lines(check: LogitCheck) -> list[str]:
    """Say what was found by running a shard and its model."""
    different = f"{check.n_different:,} of {check.n_choices:,} choices of experts differ"
    if check.n_different:
        different += (
            f", each between scores within {check.largest_gap:.1e} of each other "
            f"(rounding explains {check.allowed_gap:.1e})"
        )
    if check.largest_difference == 0 and check.agrees:
        how = "bit for bit"
    else:
        how = f"within {check.largest_difference:.1e} of the largest (rounding explains {check.allowed:.1e})"
    return [
        f"routing: {different}",
        f"logits of the {check.n_compared:,} of {check.n_tokens:,} tokens whose experts are the same: "
        f"those of the masked model, {how}; {check.same_choice:.1%} the same likeliest token",
    ]
