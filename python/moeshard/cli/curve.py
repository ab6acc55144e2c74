"""`moeshard curve`: what does a node lose by how many experts it holds?"""

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
    HeldOutOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    check_template,
    one_of,
)

if TYPE_CHECKING:
    from moeshard.evaluation.curve import Curve


def curve(
    model: ModelArgument,
    profile: Annotated[Path, typer.Option(help="What `moeshard analyze` measured; experts are chosen by it.")],
    text: HeldOutOption = None,
    chat: ChatsOption = None,
    chat_template: ChatTemplateOption = None,
    keep: Annotated[
        str | None,
        typer.Option(
            show_default="multiples of the experts that a token uses, a quarter, half, all",
            help="Experts per layer to try, such as 16,32,64.",
        ),
    ] = None,
    strategies: Annotated[
        str,
        typer.Option(
            **one_of("moeshard.evaluation.curve:CURVE_STRATEGIES", several=True),
            help="How they are chosen, several after commas: ranked (per layer, by saliency), reap, islands (of one "
            "node), contiguous, one-list (the same ids in every layer).",
        ),
    ] = "ranked",
    windows: Annotated[int, typer.Option(min=4, help="Windows of each domain.")] = 8,
    window: Annotated[int, typer.Option(min=2, help="Tokens predicted in a window.")] = 256,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens at its beginning that do not count.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write all figures as JSON; '-', here as below: to stdout, and nothing else."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a table of them.")] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw the curve: a .png, .svg or .pdf (needs moeshard[report]).")
    ] = None,
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = -1,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what a model loses by how many experts per layer it keeps, with masks, before any file is written.

    Held-out text is predicted with all experts and with each number of them, side by side. Intervals are of 95 %.
    """
    check_template(chat, chat_template)
    sizes = None if keep is None else _parse_sizes(keep)
    names = [name.strip() for name in strategies.split(",")]
    form = "png" if png is None else _picture_form(png)

    from moeshard import MoeshardError
    from moeshard.cli.files import STDOUT, Results, check_files, files_read
    from moeshard.cli.loading import load_model
    from moeshard.cli.output import progress, warn_of_text
    from moeshard.cli.terminal import print_json
    from moeshard.evaluation.curve import check_curve_strategy, measure_curve
    from moeshard.files.provenance import MADE, stamp
    from moeshard.profile.record import read_profile
    from moeshard.traffic.domains import embedded_traffic, read_texts
    from moeshard.traffic.likeness import likeness

    try:
        for name in names:
            check_curve_strategy(name)
    except MoeshardError as error:
        raise typer.BadParameter(f"--strategies: {error}") from error
    read = files_read(model, profile, *(chat or []), chat_template, texts=text)
    check_files(out, csv, binary=png, inputs=read, force=force, as_json=as_json)
    results = Results(force=force)
    if png is not None:
        from moeshard.report.drawing import require_matplotlib

        require_matplotlib()
    measured = read_profile(profile)
    loaded = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers)
    given = read_texts(text or [], chat or [], model=loaded, template=chat_template or "")
    domains = given or embedded_traffic("heldout")
    warn_of_text(likeness(domains, measured.facts.get("texts"), measured.facts.get("sketches")))
    with progress() as update:
        found = measure_curve(
            loaded,
            measured,
            domains,
            sizes=sizes,
            strategies=names,
            n_windows=windows,
            window=window,
            n_prompt=prompt,
            progress=lambda done, total: update("predicting", done / total),
        )
    found.settings[MADE] = stamp(sys.argv[1:])
    results.write(out, found.to_text())
    results.write(csv, found.to_csv())
    if png is not None:
        results.write(png, draw_picture(found, form))
    if as_json:
        print_json(found.to_json())
    elif STDOUT not in (out, csv, png):
        _report(found, [path for path in (out, csv, png) if path is not None])
    results.finish()


def _parse_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--keep '{text}': expected numbers of experts such as 16,32,64") from error


def _picture_form(path: Path) -> str:
    form = path.suffix.lower().removeprefix(".") or "png"
    if form not in ("png", "svg", "pdf"):
        raise typer.BadParameter(f"--png '{path}': a picture is a .png, .svg or .pdf")
    return form


def draw_picture(found: Curve, form: str) -> bytes:
    from moeshard.report.drawing import picture
    from moeshard.report.figure import Panel
    from moeshard.report.figures.curve import HEIGHT, draw_curve

    title = f"{found.model.name}: what a part of the experts costs"
    return picture(Panel("loss by experts kept", lambda canvas: draw_curve(canvas, found), HEIGHT), title, form)


def _report(found: Curve, written: list[Path]) -> None:
    from moeshard.cli.output import plain_table, show
    from moeshard.cli.terminal import note, say
    from moeshard.evaluation.curve import rule_of_thumb

    table = plain_table("What is lost by how many experts per layer are kept")
    table.add_column("chosen by", no_wrap=True)
    for header in ("experts", "of all", "x top-k", "nats/token", "perplexity x", "interval"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, points in found.strategies.items():
        for point in points:
            low, high = point.scores.ratio_ci
            share = f"{point.keep / found.model.n_expert:.0%}"
            measured = (f"{point.scores.excess:+.3f}", f"{point.scores.ratio:.2f}", f"{low:.2f} to {high:.2f}")
            table.add_row(name, f"{point.keep}", share, f"{found.times_top_k(point):g}", *measured)
        table.add_section()
    show(table)
    say()
    say("The rule of thumb, 4 to 8 times the experts that a token uses, measured:")
    for sentence in rule_of_thumb(found):
        say(sentence)
    tokens = sum(found.settings["windows"].values()) * (found.settings["window"] - found.settings["prompt"])
    files = "".join(f"; {path}" for path in written)
    note(f"{tokens} tokens of {', '.join(found.domains)}{files}")
