"""Apply unified diffs strictly.

Every context line must stand exactly where the diff says. Tools that search for a hunk nearby, or take a hunk that is
already there for applied, may put a call into the wrong function of a newer llama.cpp; here that is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class DiffError(Exception):
    """The diff is malformed, or does not fit the files."""


@dataclass
class Hunk:
    start: int  # line number in the old file, from 1
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


@dataclass
class FileDiff:
    name: str
    hunks: list[Hunk] = field(default_factory=list)


def lines_of(text: str) -> list[str]:
    """Split after line feeds only; str.splitlines knows a dozen other ends of a line."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def file_name(header: str) -> str:
    """Return the name in a line ``--- a/NAME`` or ``+++ b/NAME``, which may be followed by a tab and a date."""
    name = header[4:].split("\t")[0].strip()
    if not name.startswith(("a/", "b/")) or ".." in Path(name).parts:
        raise DiffError(f"expected a file name that begins with a/ or b/, not {name!r}")
    return name[2:]


def parse(diff: str) -> list[FileDiff]:
    """Parse a diff that changes files and neither creates nor deletes any; text between the files is ignored."""
    files: list[FileDiff] = []
    lines = iter(lines_of(diff))
    for line in lines:
        if line.startswith("--- "):
            header = next(lines, "")
            if not header.startswith("+++ ") or file_name(header) != file_name(line):
                raise DiffError(f"no line '+++ b/{file_name(line)}' follows {line.strip()!r}")
            files.append(FileDiff(file_name(line)))
        elif match := HUNK.match(line):
            if not files:
                raise DiffError(f"{match[0]} comes before any file name")
            hunk = Hunk(int(match[1]))
            n_old, n_new = int(match[2] or 1), int(match[4] or 1)
            while len(hunk.old) < n_old or len(hunk.new) < n_new:
                body = next(lines, "")
                if body[:1] not in (" ", "-", "+"):
                    raise DiffError(f"{files[-1].name}: {match[0]} is cut short")
                if body[0] != "+":
                    hunk.old.append(body[1:])
                if body[0] != "-":
                    hunk.new.append(body[1:])
            if (len(hunk.old), len(hunk.new)) != (n_old, n_new):
                raise DiffError(f"{files[-1].name}: {match[0]} has more lines than it says")
            if not hunk.old:
                raise DiffError(f"{files[-1].name}: {match[0]} has no context")
            files[-1].hunks.append(hunk)
        elif line[:1] in ("+", "-", "\\"):
            raise DiffError(f"a line outside of any hunk: {line.rstrip()!r}")
    if not files or not all(file.hunks for file in files):
        raise DiffError("no changes found")
    return files


def patched(content: str, diff: FileDiff) -> str:
    """Return `content` with the hunks applied."""
    lines = lines_of(content)
    out: list[str] = []
    done = 0  # lines of the old file that are dealt with
    for hunk in diff.hunks:
        begin = hunk.start - 1
        if begin < done:
            raise DiffError(f"{diff.name}: hunks overlap at line {hunk.start}")
        out += lines[done:begin]
        for number, expected in enumerate(hunk.old, start=begin):
            found = lines[number] if number < len(lines) else "(end of file)"
            if found != expected:
                raise DiffError(
                    f"{diff.name}, line {number + 1}:\n  expected {expected.rstrip()!r}\n  found    {found.rstrip()!r}"
                )
        out += hunk.new
        done = begin + len(hunk.old)
    return "".join(out + lines[done:])


def apply(diff: str, root: Path) -> None:
    """Change the files under `root` as the diff says, or none of them."""
    changed: dict[Path, str] = {}
    for file in parse(diff):
        path = root / file.name
        if path not in changed and not path.is_file():
            raise DiffError(f"{file.name}: no such file")
        changed[path] = patched(changed.get(path) or path.read_bytes().decode(), file)
    for path, content in changed.items():
        path.write_bytes(content.encode())
