"""`moeshard merge`: shards put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeshard.cli.options import ForceOption, JobsOption, JsonOption, MaxFileSizeOption


def merge(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARD...", show_default=False, help="Shards, or a trunk and its experts.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model to write.")],
    max_file_size: MaxFileSizeOption = None,
    jobs: JobsOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give the whole model back, from shards that together hold all of its experts.

    Every tensor is, byte for byte, that of the model which the shards were taken from.
    """
    from moeshard import merge as put_together
    from moeshard.cli.files import no_stdout
    from moeshard.cli.output import progress
    from moeshard.cli.terminal import note, print_json, say
    from moeshard.sizes import size

    no_stdout(out, "a model")
    with progress() as update:
        paths = put_together(
            shards,
            out,
            max_file_size=max_file_size,
            force=force,
            jobs=jobs,
            progress=lambda done, total: update("writing", done / max(total, 1)),
        )
    n_bytes = sum(Path(path).stat().st_size for path in paths)
    if as_json:
        print_json({"paths": paths, "bytes": n_bytes})
        return
    for path in paths:
        say(path)
    note(f"{size(n_bytes)} from {len(shards)} files")
