"""Writing a report: the page, which holds everything, and beside it a folder with figures as PNG and numbers as CSV."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moeshard._core import MoeshardError
from moeshard.files.atomic import write_atomically
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
        The figures of the page.

    Raises:
        MoeshardError: matplotlib is missing, there is nothing to show, or a file exists or cannot be written.
    """
    require_matplotlib()
    page, folder = Path(path), folder_of(path)
    for place in (page, folder):
        if place.exists() and not force:
            raise MoeshardError(
                f"{place}: exists already; choose another name, or replace it with --force (force=True)"
            )
    made = figures(sources)
    if not made:
        raise MoeshardError("there is nothing to show: give a profile as well")
    shown = []
    files: dict[str, str | bytes] = {}
    for figure in made:
        drawn = [
            render(panel, figure.stem(index), f"{figure.title}: {panel.label}")
            for index, panel in enumerate(figure.panels)
        ]
        shown.append(Shown(figure, [svg for svg, _ in drawn], [png for _, png in drawn]))
        files |= {f"{figure.stem(index)}.png": png for index, (_, png) in enumerate(drawn)}
        files[f"{figure.name}.csv"] = figure.data.to_csv()
    head = Head(_title(sources), _subtitle(sources), summary(sources), _facts(sources), *origins(sources))
    _write(page, write_page(head, shown), folder, files, force)
    return made


def _write(page: Path, text: str, folder: Path, files: dict[str, str | bytes], force: bool) -> None:
    """Write all or nothing: what is interrupted leaves no folder that would be in the way of the next report."""
    if folder.exists():
        for name, content in files.items():
            write_atomically(folder / name, content, force=force)
        write_atomically(page, text, force=force)
        return
    new = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        try:
            new.mkdir()
        except OSError as error:
            raise MoeshardError(f"cannot make the folder '{folder}': {error.strerror or error}") from error
        for name, content in files.items():
            write_atomically(new / name, content)
        write_atomically(page, text, force=force)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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
