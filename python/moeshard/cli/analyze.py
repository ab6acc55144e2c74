"""`moeshard analyze`: which experts does this traffic use?"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeshard.cli.options import (
    ChatsOption,
    ChatTemplateOption,
    ForceOption,
    GpuLayersOption,
    JsonOption,
    ModelArgument,
    RpcOption,
    SplitOption,
    TextOption,
    ThreadsOption,
    check_template,
    one_of,
    pipeline,
)

if TYPE_CHECKING:
    from moeshard.profile.record import Profile
    from moeshard.profile.statistics import Verdict

MICRO_TOKENS = 4096
"""Of each domain, with --micro."""


def analyze(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write, an .npz file.")],
    text: TextOption = None,
    chat: ChatsOption = None,
    chat_template: ChatTemplateOption = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", "-n", min=1, show_default="all", help="About so many tokens of each domain."),
    ] = None,
    micro: Annotated[
        bool, typer.Option("--micro", help=f"A first look: {MICRO_TOKENS} tokens of each domain.")
    ] = False,
    generate: Annotated[
        int, typer.Option(min=0, help="Of each domain, also measure so many of the model's own continuations.")
    ] = 0,
    window: Annotated[
        int | None, typer.Option(min=16, show_default="512, or the model's context", help="Tokens of a sequence.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Measure these MoE layers only, such as '0-5,9'.")] = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Measure all MoE layers (the default).")] = False,
    export_ranking: Annotated[Path | None, typer.Option(help="Also write the ranking as CSV, for split.")] = None,
    ranking: Annotated[
        str,
        typer.Option(
            **one_of("moeshard.profile.record:RANKINGS"), help="What that ranks by: saliency, mass, count or reap."
        ),
    ] = "saliency",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted analysis stopped.")] = False,
    threads: ThreadsOption = 0,
    gpu_layers: GpuLayersOption = -1,
    rpc: RpcOption = None,
    split: SplitOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure which experts some text uses, and how much they carry, in one pass without generating.

    The profile holds, for every sequence, layer and expert, how often it was chosen, with what weight, and how much it
    added (saliency: weight x norm of its output): all that plans are made from, without running the model again.
    """
    check_template(chat, chat_template)
    if layers is not None and all_layers:
        raise typer.BadParameter("--layers and --all-layers contradict each other")
    if micro and tokens is not None:
        raise typer.BadParameter("--micro says how many tokens; leave --tokens out")

    from moeshard import MoeshardError, write_ranking
    from moeshard.cli.files import check_files, files_read, no_stdout
    from moeshard.cli.loading import load_model
    from moeshard.cli.output import progress, tokens_per_second
    from moeshard.cli.terminal import print_json, warn
    from moeshard.files.provenance import MADE, stamp
    from moeshard.profile.measure import analyze as measure
    from moeshard.profile.statistics import verdict
    from moeshard.traffic.domains import embedded_traffic, read_texts

    no_stdout(out, "a profile")
    if export_ranking is not None:
        no_stdout(export_ranking, "a ranking beside a profile")
    partial = out.with_name(out.name + ".partial")
    read = files_read(model, *(chat or []), chat_template, texts=text)
    check_files(out, export_ranking, inputs=read, force=force)
    check_files(partial, inputs=[*read, out], force=True)
    loaded = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers, workers=pipeline(rpc, split))
    given = read_texts(text or [], chat or [], model=loaded, template=chat_template or "")
    domains = given or embedded_traffic("calibration")
    if partial.exists() and not resume:
        warn(f"{partial}: what an interrupted analysis left, to go on from with --resume, will be replaced")
    chosen = None if layers is None else _parse_layers(layers, loaded.n_layer)
    with progress() as update:
        profile = measure(
            loaded,
            domains,
            n_tokens=MICRO_TOKENS if micro else tokens,
            window=window,
            layers=chosen,
            n_generate=generate,
            save_to=partial,
            resume=resume,
            progress=tokens_per_second(update, "reading"),
        )
    profile.facts[MADE] = stamp(sys.argv[1:])
    try:
        profile.save(out, force=force)
    except MoeshardError as error:
        raise MoeshardError(f"{error}; what was measured is in '{partial}': run this again with --resume") from error
    partial.unlink(missing_ok=True)
    if export_ranking is not None:
        write_ranking(export_ranking, profile.ranking(ranking), profile.layers.tolist(), force=force)
    found = verdict(profile)
    if as_json:
        print_json(_facts(profile, found, out))
    else:
        _report(profile, found, out)


def _parse_layers(text: str, n_layer: int) -> list[int]:
    import numpy as np

    from moeshard.keep.text import parse_row

    return np.flatnonzero(parse_row(text, f"--layers '{text}'", n_layer, "a layer", "layers")).tolist()


def _facts(profile: Profile, found: Verdict, out: Path) -> dict[str, Any]:
    from moeshard.profile.statistics import concentration, mean_entropy, summed_concentration, tops

    layers = profile.layers.tolist()
    shown = tops(profile.n_expert)
    return {
        "profile": str(out),
        "domains": {
            name: int(profile.n_tokens[profile.domain == index].sum()) for index, name in enumerate(profile.domains)
        },
        "seconds": profile.facts["seconds"],
        "tops": shown,
        "concentration": dict(zip(layers, concentration(profile, shown).tolist(), strict=True)),
        "summed_over_ids": summed_concentration(profile, shown).tolist(),
        "entropy": dict(zip(layers, mean_entropy(profile).tolist(), strict=True)),
        "most_salient": {
            layer: {"expert": expert, "share": share, "standard_error": error}
            for layer, (expert, share, error) in zip(layers, _most_salient(profile), strict=True)
        },
        "super_experts": [
            {"layer": layer, "expert": expert, "times_median": ratio} for layer, expert, ratio in _super(profile)
        ],
        "spread": found.spread,
        "agreement": found.agreement,
        "verdict": str(found),
    }


def _most_salient(profile: Profile) -> list[tuple[int, float, float]]:
    """Of each layer the expert of most saliency, its share, and the standard error of that."""
    from moeshard.profile.statistics import share_errors, shares

    share, errors = shares(profile), share_errors(profile)
    return [
        (int(own.argmax()), float(own.max()), float(error[own.argmax()]))
        for own, error in zip(share, errors, strict=True)
    ]


def _super(profile: Profile) -> list[tuple[int, int, float]]:
    """Layer, expert, and how many times the layer's median its largest output is, of each super expert."""
    import numpy as np

    from moeshard.profile.statistics import peak_ratios, super_experts

    ratios = peak_ratios(profile)
    return [
        (int(profile.layers[row]), int(expert), float(ratios[row, expert]))
        for row, expert in np.argwhere(super_experts(profile))
    ]


def _report(profile: Profile, found: Verdict, out: Path) -> None:
    from moeshard.cli.output import plain_table, show
    from moeshard.cli.terminal import note, say
    from moeshard.profile.statistics import concentration, mean_entropy, summed_concentration, tops

    shown = tops(profile.n_expert)
    table = plain_table("Share of a layer's gate mass that its best experts carry")
    table.add_column("layer", justify="right")
    for top in shown:
        table.add_column(f"{top}", justify="right")
    table.add_column("entropy", justify="right")
    table.add_column("most salient expert")
    rows = zip(
        profile.layers, concentration(profile, shown), mean_entropy(profile), _most_salient(profile), strict=True
    )
    for layer, row, entropy, (best, share, error) in rows:
        salient = f"{best}: {share:.1%} ± {'unknown' if math.isnan(error) else f'{error:.1%}'}"
        table.add_row(str(layer), *(f"{part:.0%}" for part in row), f"{entropy:.2f}", salient)
    even = [f"{top / profile.n_expert:.0%}" for top in shown]
    table.add_row("even", *even, f"{math.log(profile.n_expert):.2f}", f"{1 / profile.n_expert:.1%}", style="dim")
    by_id = summed_concentration(profile, shown)
    table.add_row("by id", *(f"{part:.0%}" for part in by_id), style="dim")
    show(table)
    say(
        "by id: mass summed over layers, as older tools rank experts. Expert 5 of one layer and expert 5 of another "
        "have nothing to do with each other: such sums are nearly even whatever each layer does, and ids chosen by "
        "them hold no more than this in the layers."
    )
    say()
    say(found)
    say(_say_super(_super(profile)))
    seconds = max(profile.facts["seconds"], 1e-9)
    note(f"{found.n_tokens} tokens of {', '.join(profile.domains)}; {found.n_tokens / seconds:.0f} tokens/s; {out}")


def _say_super(experts: list[tuple[int, int, float]]) -> str:
    if not experts:
        return "No super experts: no expert's outputs are far larger than is usual in its layer."
    listed = ", ".join(f"{expert} of layer {layer} ({ratio:.0f}x)" for layer, expert, ratio in experts)
    return f"Super experts, with outputs many times their layer's median, which islands never drops: {listed}."
