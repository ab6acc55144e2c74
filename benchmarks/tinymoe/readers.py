"""Turn files of a package into plain documents. Each reader maps a path to a list of texts."""

from __future__ import annotations

import gzip
import html
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

#: A long file is cut here (at a blank line) so that no single document rules a split.
DOC_CHARS = 60_000

_TAG = re.compile(r"<[^>]+>")
_LICENCE_WORDS = re.compile(
    r"copyright|licen[sc]e|licenz|lizenz|permission is hereby|all rights reserved|spdx|warranty|"
    r"free software foundation|licencia|droits? d.auteur|public domain|redistribut",
    re.IGNORECASE,
)


def _text(path: Path) -> str:
    """The file as UTF-8 (older files as Latin-1), unpacked when its name says gzip."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def cut(text: str, limit: int = DOC_CHARS) -> list[str]:
    """Cut a long text at blank lines into pieces of about `limit` characters."""
    pieces: list[str] = []
    while len(text) > limit:
        at = text.rfind("\n\n", limit // 2, limit)
        at = limit if at < 0 else at
        pieces.append(text[:at])
        text = text[at:].lstrip("\n")
    return [*pieces, text]


def drop_licence_paragraphs(text: str) -> str:
    """Remove paragraphs that speak of copyright and licence; they repeat and would leak into held-out text."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(p for p in paragraphs if len(_LICENCE_WORDS.findall(p)) < 2)


def read_html(path: Path) -> list[str]:
    s = re.sub(r"(?s)<(script|style|head|pre class=\"screen\").*?</\1>", "", _text(path))
    s = re.sub(r"(?s)<div class=\"(toc|navheader|navfooter|list-of-[a-z]+)\">.*?</div>", "", s)
    s = re.sub(r"</(p|h\d|li|dt|dd|tr|pre|div)>", "\n\n", s)
    s = html.unescape(_TAG.sub("", s)).replace("\u00a0", " ")
    paragraphs = [re.sub(r"[ \t]*\n[ \t]*", "\n", p).strip() for p in re.split(r"\n\s*\n", s)]
    return cut(drop_licence_paragraphs("\n\n".join(p for p in paragraphs if p)))


_ROFF_CHAR = {
    "-": "-", "bu": "•", "em": "—", "en": "–", "aq": "'", "dq": '"', "oq": "‘", "cq": "’", "lq": "“", "rq": "”",
    "co": "©", "ga": "`", "ha": "^", "ti": "~", "rs": "\\", "Fo": "«", "Fc": "»", "mu": "×", "->": "→",
}  # fmt: skip


_ROFF_SKIP = ('.\\"', "'\\\"", ".ie", ".el", ".if", ".de", ".ds", ".nr", ".ig", "..", ".TH", ".ad", ".hy")


def read_man(path: Path) -> list[str]:
    """A manual page without its macros: enough of roff to read as prose."""
    if path.is_symlink():
        return []
    raw = _text(path)
    if raw.startswith(".so "):
        return []
    out: list[str] = []
    for line in raw.split("\n"):
        if line.startswith(_ROFF_SKIP):
            continue
        if re.fullmatch(r"\.(PP|P|LP|sp.*|TP.*|IP|RS.*|RE|nf|fi|Bl.*|El|Pp|EX|EE|br|PD.*|TS|TE|T[{}].*)", line):
            out.append("" if line.startswith((".PP", ".P", ".LP", ".sp", ".TP", ".Pp", ".IP")) else "\0")
            continue
        line = re.sub(r"^\.(SH|SS|Sh|Ss) +", "\n", line)
        line = re.sub(r"^[.'][A-Za-z]+ ?", "", line)
        line = re.sub(r"\\\((..)", lambda m: _ROFF_CHAR.get(m[1], ""), line)
        line = re.sub(r"\\\[([^\]]*)\]", lambda m: _ROFF_CHAR.get(m[1], ""), line)
        line = re.sub(r"\\f\(..|\\f\[[^\]]*\]|\\f.|\\s[-+]?\d|\\[&/,|^c%:]|\\\"$", "", line)
        line = line.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\~", " ")
        out.append(line.replace('"', "") if line.count('"') % 2 == 0 and raw.startswith('.\\"') else line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(x for x in out if x != "\0"))
    return cut(drop_licence_paragraphs(text.strip()))


def read_pod(path: Path) -> list[str]:
    s = re.sub(r"(?m)^=(cut|over|back|begin|end|for|encoding|pod)\b.*$", "", _text(path))
    s = re.sub(r"(?m)^=\w+ ?", "", s)
    for _ in range(3):  # codes nest: C<< B<x> >>
        s = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", s)
        s = re.sub(r"[BCEFILSXZ]<([^<>]*)>", r"\1", s)
    return cut(drop_licence_paragraphs(re.sub(r"\n{3,}", "\n\n", s).strip()))


def read_plain(path: Path) -> list[str]:
    return cut(drop_licence_paragraphs(_text(path).strip()))


def read_fortunes(path: Path) -> list[str]:
    """A fortune file is many short texts; a document is about 4,000 characters of them."""
    if path.suffix in (".dat", ".u8") or path.is_symlink():
        return []
    out: list[str] = []
    part: list[str] = []
    for fortune in _text(path).split("\n%\n"):
        part.append(fortune.strip())
        if sum(map(len, part)) > 4_000:
            out.append("\n%\n".join(part))
            part = []
    return [*out, "\n%\n".join(part)]


def read_code(path: Path) -> list[str]:
    """Source text without the comments at its head (and elsewhere) that state copyright and licence."""
    if not path.is_file() or path.suffix in (".zwc", ".dat"):
        return []
    s = _text(path)
    hash_comments = path.suffix not in (".hpp", ".h")
    if hash_comments:
        blocks = re.compile(r"(?m)(?:^[ \t]*#(?!!|compdef|autoload).*\n)+")
    else:
        blocks = re.compile(r"(?s:/\*.*?\*/)[ \t]*\n?|(?m:(?:^[ \t]*//.*\n)+)")
    s = blocks.sub(lambda m: "" if _LICENCE_WORDS.search(m[0]) else m[0], s)
    s = re.sub(r"\n{4,}", "\n\n\n", s).strip() + "\n"
    return cut(s)


def read_json(path: Path) -> list[str]:
    """JSON, re-indented by one blank per level; API documentation strings in HTML are left out."""
    tree = json.loads(_text(path))

    def prune(node: object) -> object:
        if isinstance(node, dict):
            return {k: prune(v) for k, v in node.items() if k != "documentation"}
        return [prune(v) for v in node] if isinstance(node, list) else node

    text = json.dumps(prune(tree), indent=1, ensure_ascii=False)
    lines, size = text.split("\n"), 0
    out: list[str] = []
    part: list[str] = []
    for line in lines:  # no blank lines to cut at: cut where an object of the second level starts
        if size > DOC_CHARS // 4 and re.match(r" {1,2}\"", line):
            out.append("\n".join(part))
            part, size = [], 0
        part.append(line)
        size += len(line) + 1
    return [*out, "\n".join(part)]


def read_metamath(path: Path) -> list[str]:
    """Statements and comments of a Metamath database; proofs (compressed, close to noise) become `?`."""
    s = re.sub(r"(?s)\$=.*?\$\.", "$= ? $.", _text(path))
    s = re.sub(r"\s*\((?:Contributed|Revised|Proof|New usage|Proposed)[^()]*\)", "", s)
    return [d for d in cut(s, 8_000) if not _LICENCE_WORDS.search(d)]


def read_kjv(path: Path) -> list[str]:
    """The King James Bible by chapter, printed by the `bible` tool of its sister package."""
    tool = path.parents[3] / "bible-kjv/usr/bin/bible"
    command = [str(tool), "-p", str(path.parent), "gen1:1-rev22:21"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapters = re.split(r"\n\n(?=(?:[123] )?[A-Z][A-Za-z ]+ \d+\n\n)", text)
    return [c.strip() for c in chapters]


def read_dictd(path: Path) -> list[str]:
    text = _text(path)
    return cut(text[text.find("PREFACE") :], 8_000)


READERS: dict[str, Callable[[Path], list[str]]] = {
    "html": read_html, "man": read_man, "pod": read_pod, "plain": read_plain, "fortunes": read_fortunes,
    "code": read_code, "json": read_json, "metamath": read_metamath, "kjv": read_kjv, "dictd": read_dictd,
}  # fmt: skip
