"""`moeshard verify`: is a shard what it says it is?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moeshard.cli.options import JsonOption


def verify(
    shard: Annotated[Path, typer.Argument(show_default=False, help="A shard, a trunk or a file of experts.")],
    source: Annotated[str, typer.Option(help="The model it was taken from ('tinymoe': the embedded one).")],
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
            logits=logits,
            n_threads=threads,
            progress=lambda done, total: update("comparing", done / max(total, 1)),
        )
    if as_json:
        print_json(asdict(found))
    else:
        experts = f"{span(found.n_expert_fewest, found.n_expert)} of {found.n_expert_source} experts per layer"
        held = f", {experts}" if found.n_expert else ""
        say(f"{found.path}: a {found.kind} of {source}{held}: all {size(found.bytes)} are the model's own")
        if found.logits is not None:
            difference = found.logits.largest_difference
            how = "bit for bit" if difference == 0 else f"within {difference:.1e} of the largest"
            say(
                f"logits of {found.logits.n_tokens} tokens: those of the masked model, {how}; "
                f"{found.logits.same_choice:.1%} the same likeliest token"
            )
    if found.logits is not None and not found.logits.agrees:
        raise MoeshardError(
            f"{found.path}: its logits differ from those of the masked model by {found.logits.largest_difference:.1e} "
            f"of the largest, more than the {found.logits.allowed:.0e} that rounding explains"
        )
