"""The colours of a report: each for a light and for a dark page, with a contrast of 4.5 or more to both its grounds."""

from __future__ import annotations

PALETTE = {
    "page": ("#ffffff", "#14161a"),
    "raised": ("#f4f5f7", "#1e2127"),
    "line": ("#d9dce2", "#343942"),
    "ink": ("#1d2026", "#e6e8ec"),
    "faint": ("#5c6370", "#a0a7b4"),
    "link": ("#1a5fa0", "#7fb8ec"),
    "mark": ("#cb2f1e", "#e7695b"),
    # Told from each other with any kind of colour vision (after Okabe and Ito, Color universal design, 2008).
    "blue": ("#2a70aa", "#4b95d3"),
    "orange": ("#a55814", "#db751a"),
    "green": ("#18795b", "#20a37b"),
    "pink": ("#b34086", "#cd72aa"),
    "yellow": ("#806812", "#b8961a"),
    "violet": ("#685cca", "#8f86d8"),
    "red": ("#bd4235", "#d5746a"),
    "cyan": ("#2a738d", "#4aa8c9"),
}
"""By name, as a variable of the page's style is called: on a light page, on a dark one. PNGs are light."""

GROUNDS = ("page", "raised")
LINES = ("line",)
"""What only divides and says nothing."""

INK, FAINT, MARK = (PALETTE[name][0] for name in ("ink", "faint", "mark"))
COLOURS = tuple(PALETTE[name][0] for name in ("blue", "orange", "green", "pink", "yellow", "violet", "red", "cyan"))
"""Of lines and dots, one after the other."""

PICTURED = "#3d85bf"
"""Of what is drawn as a picture, the same on any page: more than 3 to 1 on both."""


def variables(dark: bool) -> str:
    """Return the palette as declarations of a style sheet."""
    return "; ".join(f"--{name}: {pair[dark]}" for name, pair in PALETTE.items())


def as_variables(style: str) -> str:
    """Replace the palette's colours in an attribute of an SVG by variables, so that they follow the page's setting."""
    for name, (light, _) in PALETTE.items():
        if name not in GROUNDS:
            style = style.replace(light, f"var(--{name})")
    return style


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, ``#rrggbb``, 1 to 21, after WCAG 2."""
    low, high = sorted(_luminance(*(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def readable_on(red: float, green: float, blue: float) -> str:
    """Return black or white, whichever reads better on a ground of these parts from 0 to 1: never below 4.5."""
    return "#000000" if _luminance(red, green, blue) > 0.1791 else "#ffffff"


def _luminance(*parts: float) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
