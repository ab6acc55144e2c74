"""Drawing with matplotlib: one look for all figures, as SVG inside the page and as PNG beside it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.report.colours import FAINT, INK, MARK, as_variables, readable_on
from moeshard.report.figure import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH = 5.0
"""Inches. As wide as a phone's page in the units of an SVG, so that letters are not made smaller there."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # names from files may hold dollar signs
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.unicode_minus": False,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "image.cmap": "viridis",
    "svg.fonttype": "none",  # letters stay letters: sharp, small, selectable, and in any script
}


def require_matplotlib() -> None:
    """Raise a `MoeshardError` that says how to install it where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MoeshardError("a report needs matplotlib: pip install 'moeshard[report]'") from error


def render(panel: Panel, name: str, title: str = "") -> tuple[str, bytes]:
    """Draw a panel.

    Args:
        panel: what to draw.
        name: part of the ids in the SVG, so that several fit into one page.
        title: of the PNG, which may go where no page says what it shows.

    Returns:
        An ``<svg>`` element for a page, with a transparent ground and no reference outside itself, and a PNG on white.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    svg, png = io.StringIO(), io.BytesIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The PNG's font may lack letters of a name; that is no reason to say so once per letter.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas = Canvas(figsize=(WIDTH, panel.height), layout="constrained")
        panel.draw(canvas)
        heading = canvas.text(0.01, 1.02, title, fontsize=9, va="bottom")
        canvas.savefig(png, format="png", dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.08)
        heading.remove()
        canvas.set_layout_engine("none")  # it is done, and takes most of the time
        canvas.savefig(svg, format="svg", transparent=True, dpi=160)
    return _embeddable(svg.getvalue(), name, panel.label), png.getvalue()


def picture(panel: Panel, title: str, form: str) -> bytes:
    """Draw a panel as a file of its own, on white: ``png``, ``svg`` or ``pdf``."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    data = io.BytesIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        canvas = Canvas(figsize=(WIDTH, panel.height), layout="constrained")
        panel.draw(canvas)
        canvas.text(0.01, 1.02, title, fontsize=9, va="bottom")
        canvas.savefig(data, format=form, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    return data.getvalue()


def _embeddable(text: str, name: str, label: str) -> str:
    """Make an SVG file an element of a page."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            # A page's own style takes the place of the one rule, which would be in force outside the figure too.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
        parent.tag = parent.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: _rewritten(value, name) for key, value in parent.attrib.items()}
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        parent.attrib.clear()
        parent.attrib.update(attributes)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"role": "img", "aria-label": label, "viewBox": box})
    return ElementTree.tostring(root, encoding="unicode")


def _rewritten(value: str, name: str) -> str:
    """An attribute's value: ids of all figures of a page must differ, and letters have the page's colour and font."""
    if value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = as_variables(value.replace("url(#", f"url(#{name}-"))
    return re.sub(r"(font: [^;]*?px) [^;]*", r"\1 sans-serif", value)


def heat_map(canvas: Canvas, values: npt.NDArray[np.floating], top: float, label: str) -> Axes:
    """Draw a picture with one pixel per value, and its scale from 0 to `top`; return its axes.

    The scale is that of square roots: most values are small, and differ.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    axes = canvas.add_subplot()
    scale = PowerNorm(0.5, vmin=0, vmax=top if top > 0 else 1)
    # Not interpolated: the SVG holds the picture pixel by pixel, and a browser enlarges it sharply.
    image = axes.imshow(values, aspect="auto", interpolation="none", norm=scale)
    bar = canvas.colorbar(image, ax=axes, pad=0.015, aspect=30, fraction=0.05, extend="max")
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.set_label(label)
    bar.outline.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def matrix(
    canvas: Canvas,
    values: npt.NDArray[np.floating],
    rows: Sequence[str],
    columns: Sequence[str],
    write: Any,
    *,
    marked: npt.NDArray[np.bool_] | None = None,
    reverse: bool = False,
) -> Axes:
    """Draw numbers in coloured cells; `marked` ones have a frame."""
    axes = canvas.add_subplot()
    finite = values[np.isfinite(values)]
    # From 0, so that small differences look small.
    low, high = (min(0.0, float(finite.min())), float(finite.max())) if finite.size else (0.0, 1.0)
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="none",
        cmap="viridis_r" if reverse else "viridis",
        vmin=low,
        vmax=high if high > low else low + 1,
    )
    size = 8 if len(columns) <= 6 else 7 if len(columns) <= 8 else 6 if len(columns) <= 12 else 4.5
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            red, green, blue, _ = image.cmap(image.norm(value))
            chosen = marked is not None and bool(marked[row, column])
            axes.text(
                column,
                row,
                write(value) if np.isfinite(value) else "–",
                ha="center",
                va="center",
                fontsize=size,
                color=INK if not np.isfinite(value) else readable_on(red, green, blue),
                fontweight="bold" if chosen else "normal",
            )
            if chosen:
                # Two of them: one stands out on any colour of a cell.
                axes.add_patch(_frame(column, row, 3.2, "#ffffff"))
                axes.add_patch(_frame(column, row, 1.6, MARK))
    axes.set_xticks(range(len(columns)), [shortened(name) for name in columns])
    axes.set_yticks(range(len(rows)), [shortened(name) for name in rows])
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    if len(columns) > 5 and max(map(len, columns)) > 40 // len(columns):
        for text in axes.get_xticklabels():
            text.set(rotation=40, ha="left", rotation_mode="anchor")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _frame(column: int, row: int, width: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=width)


def shortened(name: str, most: int = 18) -> str:
    """Cut a long name, as `…` shows."""
    flat = " ".join(name.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def intervals(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    spans: Sequence[Sequence[float] | None],
    colours: Sequence[str],
) -> None:
    """Draw a line per name, the first on top: a dot, and its interval where there is one."""
    for row, (value, span, colour) in enumerate(zip(values, spans, colours, strict=True)):
        if span is not None:
            axes.plot(span, [row, row], color=colour, linewidth=1.4, solid_capstyle="butt")
        axes.plot([value], [row], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
