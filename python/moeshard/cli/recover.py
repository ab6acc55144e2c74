"""`moeshard recover`: give nodes back what their missing experts did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeshard.cli.options import (
    ChatsOption,
    ChatTemplateOption,
    ForceOption,
    GpuLayersOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
    check_template,
    one_of,
)

if TYPE_CHECKING:
    from moeshard.recovery.recover import Recovered


def recover(
    model: ModelArgument,
    plan: Annotated[Path, typer.Option(help="The nodes: what `moeshard plan` or `moeshard split` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write recoveries to, a file per node.")],
    text: TextOption = None,
    chat: ChatsOption = None,
    chat_template: ChatTemplateOption = None,
    node: Annotated[
        list[str] | None, typer.Option(metavar="NAME", show_default="all", help="Recover this node; may be repeated.")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            **one_of("moeshard.recovery.recover:PARTS", several=True),
            show_default="all",
            help="What to fit. down: the kept experts' down projections. gain: a factor for each kept expert.",
        ),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="one per layer",
            help="Correct the layers in so many blocks, each in a pass over the text.",
        ),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            show_default="chosen on held-out text", help="How strongly experts are held at what they are; above 0."
        ),
    ] = None,
    recover_type: Annotated[
        str, typer.Option(metavar="TYPE", help="Write corrected tensors in this type, such as q8_0 or f16.")
    ] = "source",
    windows: Annotated[
        int | None, typer.Option(min=1, show_default="all", help="Windows of each domain, evenly spread over its text.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens at its beginning, by which it is placed on a node.")] = 64,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted recovery stopped.")] = False,
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = -1,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit the experts of each node to do what the whole model does, for the text that the node would be given.

    Layer by layer, in closed form: no gradients, no training. What is written goes into shards (`moeshard split
    --recovery`), which any llama.cpp loads as before, or is tried out first (`moeshard evaluate --recovery`).
    """
    check_template(chat, chat_template)
    from dataclasses import asdict

    from moeshard.cli.files import files_read, no_stdout
    from moeshard.cli.loading import load_model
    from moeshard.cli.output import progress
    from moeshard.cli.terminal import print_json
    from moeshard.planning.plan import read_plan
    from moeshard.recovery.recover import PARTS
    from moeshard.recovery.recover import recover as fit
    from moeshard.traffic.domains import embedded_traffic, read_texts

    no_stdout(out, "recoveries")
    planned = read_plan(plan)
    loaded = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers)
    given = read_texts(text or [], chat or [], model=loaded, template=chat_template or "")
    with progress() as update:
        found = fit(
            loaded,
            planned,
            out,
            given or embedded_traffic("calibration"),
            nodes=node,
            parts=PARTS if parts is None else [part.strip() for part in parts.split(",")],
            passes=passes,
            ridge=ridge,
            recover_type=recover_type,
            n_windows=windows,
            window=window,
            n_prompt=prompt,
            inputs=files_read(model, plan, *(chat or []), chat_template, texts=text),
            resume=resume,
            force=force,
            command=sys.argv[1:],
            progress=update,
        )
    if as_json:
        print_json({"recoveries": [asdict(one) for one in found]})
    else:
        _report(found)


def _report(found: list[Recovered]) -> None:
    from moeshard.cli.output import plain_table, show
    from moeshard.cli.terminal import command, note
    from moeshard.sizes import size

    table = plain_table("What each node's stream lacks of the whole model's, of its square, on text that was held out")
    table.add_column("file", overflow="fold")
    for header in ("windows", "first layer", "last layer", "layers", "bytes", "more"):
        table.add_column(header, justify="right", no_wrap=True)
    for one in found:
        first, last = one.layers[0], one.layers[-1]
        corrected = sum(layer.corrected for layer in one.layers)
        table.add_row(
            one.path,
            str(one.windows),
            f"{first.before:.3f} to {first.after:.3f}",
            f"{last.before:.3f} to {last.after:.3f}",
            f"{corrected} of {len(one.layers)}",
            size(one.bytes),
            size(one.bytes - one.bytes_before) if one.bytes > one.bytes_before else "none",
        )
    show(table)
    note(f"try it out with: {command('moeshard', 'evaluate', '--recovery')} …")
