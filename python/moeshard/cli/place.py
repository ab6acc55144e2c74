"""`moeshard place`: which node should have this session?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeshard.cli.options import ChatTemplateOption, GpuLayersOption, JsonOption, ThreadsOption, one_of
from moeshard.cli.prompts import ChatOption, PromptFileOption, PromptOption, SystemOption, apply_template, read_prompt

if TYPE_CHECKING:
    from moeshard.placement.decision import Placed

REFUSED = 3
"""Exit code where no node is good enough."""


def place(
    plan: Annotated[Path, typer.Option(help="The nodes: what `moeshard plan` wrote.")],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="The whole model, a GGUF file or 'tinymoe'; by default the one that the plan was made from.",
        ),
    ] = None,
    prompt: PromptOption = None,
    file: PromptFileOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    chat_template: ChatTemplateOption = None,
    probe: Annotated[
        str,
        typer.Option(
            **one_of("moeshard.placement.probes:PROBES"),
            help="loss: the node that predicts the prompt best. saliency: the one that holds most of the experts that "
            "the prompt wants; faster, as nodes are not computed. both: by the two together.",
        ),
    ] = "both",
    min_quality: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="loss: refuse where the prompt's perplexity on the whole model, divided by that on the best node, is "
            "lower; 0: never. both: the product of the two limits counts.",
        ),
    ] = 0.5,
    min_captured: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="saliency: refuse where the best node holds less of the prompt's.")
    ] = 0.4,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=16, help="Look at so many last tokens of the prompt at most.")
    ] = 512,
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = -1,
    as_json: JsonOption = False,
) -> None:
    """Say which node of a plan should have the session that begins with a prompt.

    The exit code is 0 where a node was found, and 3 where none is good enough: the whole model should have it.
    """
    text = read_prompt(prompt, file, chat, system, chat_template)

    from moeshard.cli.loading import load_model
    from moeshard.cli.terminal import print_json
    from moeshard.placement.placement import Placement, planned_model
    from moeshard.planning.plan import read_plan

    nodes = read_plan(plan)
    loaded = load_model(
        str(planned_model(nodes)) if model is None else model, n_threads=threads, n_gpu_layers=gpu_layers
    )
    placement = Placement(nodes, loaded, min_quality=min_quality, min_captured=min_captured, max_tokens=tokens)
    placed = placement.place(apply_template(loaded, text, chat, system, chat_template)[1], probe)
    if as_json:
        print_json(placed.to_json())
    else:
        _report(placed)
    if placed.node is None:
        raise typer.Exit(REFUSED)


def _report(placed: Placed) -> None:
    from math import exp

    from moeshard.cli.output import plain_table, show
    from moeshard.cli.terminal import note, say

    columns: dict[str, dict[str, str]] = {}
    if placed.excess is not None:
        columns["nats per token over the whole model"] = {name: f"{nats:+.3f}" for name, nats in placed.excess.items()}
        columns["quality"] = {name: f"{exp(-nats):.2f}" for name, nats in placed.excess.items()}
    if placed.captured is not None:
        columns["captured"] = {name: f"{share:.0%}" for name, share in placed.captured.items()}
    if placed.probe == "both":
        columns["fit"] = {name: f"{fit:.2f}" for name, fit in placed.scores.items()}
    table = plain_table()
    table.add_column("node")
    for header in columns:
        table.add_column(header, justify="right")
    lower_is_better = placed.probe == "loss"
    for name in sorted(placed.scores, key=placed.scores.__getitem__, reverse=not lower_is_better):
        style = "bold" if name == placed.node else None
        table.add_row(name, *(texts[name] for texts in columns.values()), style=style)
    show(table)
    say()
    say(placed.reason if placed.node else f"refused: {placed.reason}")
    cut = f", the last of {placed.n_tokens + placed.n_cut}" if placed.n_cut else ""
    note(f"{placed.n_tokens} tokens{cut}; probe {placed.probe}")
