"""The page: plain HTML that holds its figures and needs nothing from anywhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from moeshard.report.colours import variables
from moeshard.report.figure import Figure, Table

_COLOURS = f"""
:root {{ color-scheme: light dark; {variables(False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(True)} }} }}
@media print {{ :root {{ {variables(False)} }} }}"""
_STYLE = """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 0 0 .5rem }
p { margin: .4rem 0; overflow-wrap: anywhere }
a { color: var(--link) }
nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.4rem }
.faint, figcaption { color: var(--faint); font-size: .875rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0 }
.facts div { background: var(--raised); border-radius: .5rem; padding: .6rem .8rem }
.facts dt { color: var(--faint); font-size: .8rem }
.facts dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.verdict { background: var(--raised); border-left: .3rem solid var(--link); border-radius: .3rem;
  padding: .6rem .9rem; margin: 1.2rem 0 }
.verdict p:first-of-type { font-size: 1.15rem; font-weight: 600 }
figure { margin: 1rem 0; max-width: 42rem }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch }
figure svg { display: block; width: 100%; height: auto }
figure svg * { stroke-linejoin: round }
.tabs { display: flex; flex-wrap: wrap; gap: .35rem; margin: .8rem 0 .4rem }
.tabs label { border: 1px solid var(--line); border-radius: 1rem; padding: .15rem .75rem; cursor: pointer;
  font-size: .875rem; max-width: 100%; overflow-wrap: anywhere }
.choice { position: absolute; opacity: 0 }
.panel { display: none }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .2rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, .words td, .words th { text-align: left }
.words td { white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.words td:first-child { white-space: nowrap; overflow-wrap: normal }
thead th { color: var(--faint); font-weight: 600 }
caption { caption-side: top; text-align: left; color: var(--faint); padding: .3rem 0; white-space: nowrap }
details { margin: .6rem 0 }
summary { cursor: pointer; color: var(--link) }
pre { background: var(--raised); border-radius: .5rem; padding: .7rem .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; font-size: .8rem }
@media print { .panel { display: block } .tabs { display: none } }
"""

_LONG_TABLE = 8
"""Rows, beyond which a table is folded."""


@dataclass(frozen=True)
class Shown:
    """A figure with its pictures: an ``<svg>`` element for each of its panels."""

    figure: Figure
    pictures: Sequence[str]
    files: Sequence[bytes]
    """The same as PNG."""


@dataclass(frozen=True)
class Head:
    """What stands above the figures, and below them."""

    title: str
    subtitle: str
    verdict: Sequence[str]
    """Sentences, the most important one first."""
    facts: Sequence[tuple[str, str]]
    """Names and values."""
    made: str
    """When, and by what."""
    origins: Sequence[tuple[str, Table]]
    """Where everything comes from."""


def write_page(head: Head, shown: Sequence[Shown]) -> str:
    """Return the page, with its figures, and with their pictures and numbers to be saved, inside."""
    title = head.title
    links = "\n".join(f'<a href="#{one.figure.name}">{escape(one.figure.title)}</a>' for one in shown)
    tiles = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in head.facts)
    verdict = "\n".join(f"<p>{escape(sentence)}</p>" for sentence in head.verdict)
    sections = "\n".join(_section(one) for one in shown)
    origins = "\n".join(_table(name, table, "words") for name, table in head.origins)
    choices = "\n".join(_choice_rules(one) for one in shown if len(one.pictures) > 1)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · moeshard report</title>
<style>{_COLOURS}{_STYLE}{choices}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="faint">{escape(head.subtitle)}</p>
<div class="verdict">
{verdict}
</div>
<dl class="facts">
{tiles}
</dl>
<nav aria-label="Figures">
{links}
<a href="#origins">Where this comes from</a>
</nav>
</header>
{sections}
<section id="origins">
<h2>Where this comes from</h2>
<p>{escape(head.made)}</p>
{origins}
</section>
</main>
</body>
</html>
"""


def _section(one: Shown) -> str:
    figure = one.figure
    says = "\n".join(f"<p>{escape(text)}</p>" for text in figure.says)
    tables = "\n".join(_table(title, table) for title, table in figure.tables)
    quotes = "\n".join(
        f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        for title, text in figure.quotes
    )
    return f"""<section id="{figure.name}">
<h2>{escape(figure.title)}</h2>
{says}
{_pictures(one)}
{tables}
{quotes}
</section>"""


def _saved(name: str, kind: str, data: bytes, label: str) -> str:
    """A link that saves what it holds."""
    return f'<a download="{name}" href="data:{kind};base64,{b64encode(data).decode()}">{label}</a>'


def _pictures(one: Shown) -> str:
    figure = one.figure
    data = _saved(f"{figure.name}.csv", "text/csv", figure.data.to_csv().encode(), "numbers (CSV)")
    single = len(one.pictures) == 1
    parts = []
    for index, (panel, picture) in enumerate(zip(figure.panels, one.pictures, strict=True)):
        image = _saved(f"{figure.stem(index)}.png", "image/png", one.files[index], "picture (PNG)")
        name = "" if single else f' class="panel panel-{index}"'
        label = escape(panel.label)
        parts.append(
            f'<figure{name}><div class="wide">{picture}</div>\n'
            f"<figcaption>{label} · {image}{f' · {data}' if index == 0 else ''}</figcaption></figure>"
        )
    if single:
        return parts[0]
    # Chosen without a script: the picture that is shown is the one whose button is on.
    buttons = "\n".join(
        f'<input class="choice" type="radio" name="{figure.name}" id="{figure.name}-show-{index}"'
        f"{' checked' if index == 0 else ''}>"
        for index in range(len(parts))
    )
    labels = "\n".join(
        f'<label for="{figure.name}-show-{index}">{escape(panel.label)}</label>'
        for index, panel in enumerate(figure.panels)
    )
    return f'<div class="chooser">\n{buttons}\n<div class="tabs">{labels}</div>\n' + "\n".join(parts) + "\n</div>"


def _links(folder: str, figure: Figure, index: int) -> str:
    """Links to the files of a panel."""
    image = f'<a href="{folder}/{figure.stem(index)}.png">picture (PNG)</a>'
    return f' · {image} · <a href="{folder}/{figure.name}.csv">numbers (CSV)</a>'


def _choice_rules(one: Shown) -> str:
    """Style that shows the chosen panel of a figure, and its button as the chosen one."""
    rules = []
    for index in range(len(one.pictures)):
        button = f"#{one.figure.name}-show-{index}"
        rules.append(f"{button}:checked ~ .panel-{index} {{ display: block }}")
        label = f'.tabs label[for="{button[1:]}"]'
        rules.append(f"{button}:checked ~ {label} {{ background: var(--ink); color: var(--page) }}")
        rules.append(f"{button}:focus-visible ~ {label} {{ outline: 2px solid var(--link) }}")
    return "\n".join(rules)


def _table(title: str, table: Table, kind: str = "numbers") -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in table.header)
    rows = "\n".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in table.rows)
    content = f"""<div class="wide"><table class="{kind}">
<caption>{escape(title)}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>"""
    if len(table.rows) <= _LONG_TABLE:
        return content
    return f"<details><summary>{escape(title)} ({len(table.rows)} rows)</summary>{content}</details>"
