"""`moeshard evaluate`: what do the nodes of a plan lose, and are sessions placed well?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from moeshard.cli.options import (
    ChatsOption,
    ChatTemplateOption,
    ForceOption,
    GpuLayersOption,
    HeldOutOption,
    JsonOption,
    ModelArgument,
    RpcOption,
    SplitOption,
    ThreadsOption,
    check_template,
    one_of,
    pipeline,
)

if TYPE_CHECKING:
    from moeshard import Evaluation
    from moeshard.placement.probes import Probe


def evaluate(
    model: ModelArgument,
    plan: Annotated[Path, typer.Option(help="The nodes: what `moeshard plan` or `moeshard split` wrote.")],
    text: HeldOutOption = None,
    chat: ChatsOption = None,
    chat_template: ChatTemplateOption = None,
    shards: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run the shards in this folder instead of masks on the model.")
    ] = None,
    recovery: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Correct the nodes' experts by what `moeshard recover` wrote to this folder."),
    ] = None,
    probe: Annotated[
        str,
        typer.Option(
            **one_of("moeshard.placement.probes:PROBES"),
            help="What places a session by its prompt. loss: the node that predicts it best. saliency: the one that "
            "holds most of the experts that it wants. both: by the two together.",
        ),
    ] = "both",
    windows: Annotated[int, typer.Option(min=4, help="Windows of each domain, evenly spread over its text.")] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens predicted in a window.")] = 256,
    prompt: Annotated[
        int, typer.Option(min=1, help="Tokens at its beginning that place the session and do not count.")
    ] = 64,
    generate: Annotated[
        int,
        typer.Option(min=0, help="Look for degenerate loops in so many answers per domain and node; 0: in none."),
    ] = 4,
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", min=1, show_default="128", help="Length of an answer.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, show_default="0.8", help="Of the answers; 0: the likeliest token always."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first one of the answers.")] = 0,
    min_quality: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Exit with code 1 where the whole model's perplexity, divided by that as placed, is lower.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write all figures as JSON; '-': to stdout, and nothing else."),
    ] = None,
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = -1,
    rpc: RpcOption = None,
    split: SplitOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what the nodes of a plan lose against the whole model, and how well sessions are placed on them.

    The whole model and all nodes predict held-out text side by side: the first tokens of each window place its session
    on a node, the others are scored. Nodes are masks on the whole model, so no shard is needed. Intervals are of 95 %.

    The exit code is 0, or 1 for an error or a quality under --min-quality.
    """
    check_template(chat, chat_template)
    from moeshard import evaluate as measure
    from moeshard.cli.evaluation_tables import report
    from moeshard.cli.files import STDOUT, Results, check_files, files_read
    from moeshard.cli.loading import load_model
    from moeshard.cli.output import progress, warn_of_text
    from moeshard.cli.terminal import command, note, print_json
    from moeshard.evaluation.evaluate import text_likeness
    from moeshard.evaluation.loops import N_TOKENS
    from moeshard.files.provenance import stamp
    from moeshard.planning.plan import read_plan
    from moeshard.runtime.answers import Sampling
    from moeshard.traffic.domains import embedded_traffic, read_texts

    if prompt >= window:
        raise typer.BadParameter(f"--prompt {prompt} leaves nothing to predict of --window {window}")
    if not generate and (tokens is not None or temperature is not None):
        raise typer.BadParameter("--tokens and --temperature are of answers, of which --generate 0 writes none")
    # All that can be wrong is looked at before the work, not after it.
    recoveries = [] if recovery is None else files_read(folder=recovery)
    read = files_read(model, plan, *(chat or []), *recoveries, chat_template, texts=text, folder=shards)
    check_files(out, inputs=read, force=force, as_json=as_json)
    results = Results(force=force)
    nodes = read_plan(plan)
    loaded = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers, workers=pipeline(rpc, split))
    given = read_texts(text or [], chat or [], model=loaded, template=chat_template or "")
    domains = given or embedded_traffic("heldout")
    warn_of_text(text_likeness(loaded, domains, nodes, recovery))
    with progress() as update:
        found = measure(
            loaded,
            nodes,
            domains,
            shards=shards,
            recovery=recovery,
            probe=cast("Probe", probe),
            n_windows=windows,
            window=window,
            n_prompt=prompt,
            n_answers=generate,
            n_tokens=N_TOKENS if tokens is None else tokens,
            sampling=Sampling() if temperature is None else Sampling(temperature=temperature),
            seed=seed,
            progress=update,
        )
    found = replace(found, plan_file=str(plan), made=stamp(sys.argv[1:]))
    results.write(out, found.to_text())
    if as_json:
        print_json(found.to_json())
    elif out != STDOUT:
        report(found)
        if out is not None:
            note(f"{out}; show it with: {command('moeshard', 'report', out)}")
    results.finish()
    if min_quality is not None:
        _demand(found, min_quality)


def _demand(found: Evaluation, min_quality: float) -> None:
    from moeshard import MoeshardError

    quality = found.placed.quality
    if quality < min_quality:
        raise MoeshardError(
            f"placed.ratio: placed by {found.probe}, perplexity is {found.placed.ratio:.3f} times the whole model's, a "
            f"quality of {quality:.3f}, below the {min_quality:g} of --min-quality"
        )
