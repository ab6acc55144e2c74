"""Writing a report: the page, which holds everything, and beside it a folder with figures as PNG and numbers as CSV."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from moeshard._core import MoeshardError
from moeshard.files.atomic import StrPath, check_outputs, made_folder, write_together
from moeshard.report.drawing import render, require_matplotlib
from moeshard.report.figure import Figure, counted, nats
from moeshard.report.figures.curve import loss_curve
from moeshard.report.figures.evaluation import comparison, loops, loss_matrix
from moeshard.report.figures.plan import captured_matrix, keep_curve, overlap
from moeshard.report.figures.profile import concentrated, heat, outstanding
from moeshard.report.origins import origins
from moeshard.report.page import Head, Shown, write_page
from moeshard.report.sources import Sources
from moeshard.report.summary import summary


def figures(sources: Sources) -> list[Figure]:
    """Return the figures that can be made from what there is, in the order of the page."""
    return [figure for figure in _figures(sources) if figure is not None]


def _figures(sources: Sources) -> Iterator[Figure | None]:
    profile, plan, evaluation, curve = sources.profile, sources.plan, sources.evaluation, sources.curve
    if evaluation is not None:
        yield comparison(evaluation)
        yield loss_matrix(evaluation)
    if plan is not None:
        yield captured_matrix(plan, profile)
        yield overlap(plan)
    if evaluation is not None:
        yield loops(evaluation)
    if curve is not None:
        yield loss_curve(curve, plan, evaluation)
    if profile is not None:
        yield keep_curve(profile, plan)
        yield heat(profile)
        yield concentrated(profile)
        yield outstanding(profile)


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the folder beside a page in which its PNG and CSV files are: ``report_files`` of ``report.html``."""
    page = Path(path)
    return page.with_name(f"{page.stem}_files")


def write_report(sources: Sources, path: str | os.PathLike[str], *, force: bool = False) -> list[Figure]:
    """Write a page, which needs nothing but itself, and a folder with its figures as PNG and their numbers as CSV.

    Args:
        sources: what to report on.
        path: of the page; its folder must exist.
        force: whether existing files are replaced. Other files in the folder are left alone.

    Returns:
        The figures of the page. All of its files are there when all are complete, or none is.

    Raises:
        MoeshardError: matplotlib is missing, there is nothing to show, or a file exists, is one of those that the
            sources were read from, or cannot be written.
    """
    made = _some_figures(sources)
    page, folder = Path(path), folder_of(path)
    check_outputs([page], sources.files.values(), force=force)
    if folder.is_dir():
        check_outputs([folder / name for name in _names(made)], sources.files.values(), force=force)
    elif os.path.lexists(folder):
        raise MoeshardError(f"{folder}: is not a folder; figures are to be written into it: choose another name")
    shown, files = _draw(made)
    text = _page(sources, shown)
    with made_folder(folder):
        places: dict[StrPath, bytes | str] = {folder / name: data for name, data in files.items()}
        write_together(places | {page: text}, inputs=sources.files.values(), force=force)
    return made


def report_page(sources: Sources) -> str:
    """Return the page alone: see `write_report`."""
    shown, _ = _draw(_some_figures(sources))
    return _page(sources, shown)


def _page(sources: Sources, shown: Sequence[Shown]) -> str:
    head = Head(_title(sources), _subtitle(sources), summary(sources), _facts(sources), *origins(sources))
    return write_page(head, shown)


def _some_figures(sources: Sources) -> list[Figure]:
    require_matplotlib()
    made = figures(sources)
    if not made:
        raise MoeshardError("there is nothing to show: give a profile as well")
    return made


def _names(made: Sequence[Figure]) -> Iterator[str]:
    """The files of the folder."""
    for figure in made:
        yield from (f"{figure.stem(index)}.png" for index in range(len(figure.panels)))
        yield f"{figure.name}.csv"


def _draw(made: Sequence[Figure]) -> tuple[list[Shown], dict[str, bytes | str]]:
    """Return what the page shows, and the files of the folder by name."""
    shown = []
    files: list[bytes | str] = []
    for figure in made:
        drawn = [
            render(panel, figure.stem(index), f"{figure.title}: {panel.label}")
            for index, panel in enumerate(figure.panels)
        ]
        shown.append(Shown(figure, [svg for svg, _ in drawn], [png for _, png in drawn]))
        files += [*(png for _, png in drawn), figure.data.to_csv()]
    return shown, dict(zip(_names(made), files, strict=True))


def _title(sources: Sources) -> str:
    return sources.model.name or sources.model.arch


def _subtitle(sources: Sources) -> str:
    model = sources.model
    routing = f"{counted(len(model.moe_layers), 'layer')} with {counted(model.n_expert, 'expert')} each"
    return f"{model.arch}, {routing}"


def _facts(sources: Sources) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    profile, plan, evaluation = sources.profile, sources.plan, sources.evaluation
    facts = []
    if evaluation is not None:
        facts.append(("lost as placed, nats per token", nats(evaluation.placed.excess)))
        facts.append(("perplexity, times the full model's", f"{evaluation.placed.ratio:.2f}"))
    if plan is not None:
        kept = sorted({int(size) for node in plan.nodes for size in node.keep[plan.model.moe_layers].sum(axis=1)})
        sizes = f"{kept[0]}" if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
        facts.append(("plan", f"{counted(len(plan.nodes), 'node')}, {plan.strategy}"))
        facts.append(("experts of a node, per layer", f"{sizes} of {plan.model.n_expert}"))
    if profile is not None:
        facts.append(
            (f"tokens measured, of {counted(len(profile.domains), 'domain')}", f"{int(profile.n_tokens.sum()):,}")
        )
    return facts
