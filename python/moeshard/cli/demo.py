"""`moeshard demo`: what half of the experts is worth, shown on the embedded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeshard.cli.options import JsonOption, one_of

if TYPE_CHECKING:
    from rich.table import Table

    from moeshard.demo import Demo, Run


def demo(
    domain: Annotated[
        str,
        typer.Option(
            **one_of("moeshard.traffic.embedded:embedded_domains"),
            help="The traffic that the best half is chosen for: the name of an embedded text.",
        ),
    ] = "en",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", show_default="one of the domain", help="The text to continue.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Length of the answers.")] = 48,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of 256 tokens to score per domain: more take longer and say more.")
    ] = 4,
    threads: Annotated[
        int, typer.Option(min=0, help="Threads that compute; 0: one per processor. One is enough for so small a model.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """See a small real model answer with all its experts and with two different halves of them.

    Needs no model and no network: model and texts are in the package. One half is chosen per layer for one domain of
    text (by saliency, on text that is not scored), the other is simply experts 0 to 63. Both are equally large and
    fast; the table shows what each can still predict.
    """
    from moeshard.cli.loading import load_model
    from moeshard.cli.output import progress, show
    from moeshard.cli.terminal import print_json, say
    from moeshard.demo import run_demo
    from moeshard.traffic.embedded import MODEL_NAME

    model = load_model(MODEL_NAME, n_threads=threads)
    with progress() as update:
        result = run_demo(
            model,
            domain,
            prompt=prompt,
            max_tokens=max_tokens,
            n_windows=windows,
            progress=lambda what, done, total: update(what, done / total),
        )
    if as_json:
        print_json(result.to_dict())
        return
    say(result.model, bold=True, nl=False)
    say(
        f": {result.arch}, {result.n_layer} layers; in each, a token uses {result.n_expert_used} of {result.n_expert} "
        f"experts."
    )
    for table in (_answers(result), _costs(result), _carriers(result)):
        show("", table)
    show(
        "",
        _conclusion(result),
        "",
        "Next: moeshard inspect MODEL and moeshard generate MODEL -p TEXT --keep 0-63, with any GGUF of a MoE model, "
        "or with 'tinymoe' for this one.",
    )


def _table(title: str, **options: Any) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", **options)


def _answers(result: Demo) -> Table:
    from rich.text import Text

    from moeshard.cli.output import page_width
    from moeshard.cli.terminal import printable

    table = _table(f"How each continues “{' '.join(result.prompt.split())}”", width=page_width())
    for run in result.runs:
        table.add_column(run.name, ratio=1, overflow="fold")
    for_reading = ("\n".join(line for line in run.text.splitlines() if line.strip()) for run in result.runs)
    table.add_row(*(Text(printable(text.strip(), lines=True)) for text in for_reading))
    return table


def _costs(result: Demo) -> Table:
    from moeshard.sizes import size

    table = _table("What each holds, and what that costs")
    table.add_column("")
    for run in result.runs:
        table.add_column(run.name, justify="right")
    table.add_row("experts per layer", *(f"{run.held} of {result.n_expert}" for run in result.runs))
    table.add_row("weights", *(size(run.bytes) for run in result.runs))
    table.add_row("tokens/s generating", *(f"{run.tokens_per_second:.0f}" for run in result.runs))
    table.add_row("tokens/s reading", *(f"{run.prompt_tokens_per_second:.0f}" for run in result.runs))
    table.add_section()
    for domain in sorted(result.runs[0].scores, key=lambda name: name != result.domain):
        style = "bold" if domain == result.domain else None
        table.add_row(f"perplexity {domain}", *(_perplexity(result, run, domain) for run in result.runs), style=style)
    return table


def _perplexity(result: Demo, run: Run, domain: str) -> str:
    text = f"{run.scores[domain].perplexity:.1f}"
    return text if run is result.runs[0] else f"{text} ({result.loss(run, domain):+.0%})"


def _carriers(result: Demo) -> Table:
    from rich import box

    title = "Experts that carried prompt and answer (share of the layer's gate mass)"
    table = _table(title, box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("layer", justify="right")
    for run in result.runs:
        table.add_column(run.name)
    for layer in result.runs[0].top_experts:
        carried = (run.top_experts[layer] for run in result.runs)
        table.add_row(str(layer), *(", ".join(f"{top.id} {top.share:.0%}" for top in tops) for tops in carried))
    return table


def _conclusion(result: Demo) -> str:
    """Say in one paragraph what the tables show, from their numbers."""
    from moeshard.sizes import size

    full, best, first = result.runs
    others = [result.loss(best, domain) for domain in best.scores if domain != result.domain]
    text = (
        f"Both halves take {size(best.bytes)} instead of {size(full.bytes)}. On unseen {result.domain} text, "
        f"perplexity changes by {result.loss(best, result.domain):+.0%} with the half chosen for it, and by "
        f"{result.loss(first, result.domain):+.0%} with experts 0 to {first.held - 1}."
    )
    if others:
        text += (
            f" On the other texts, the chosen half changes it by {min(others):+.0%} to {max(others):+.0%}: which "
            f"experts to hold is a question of traffic."
        )
    return text
