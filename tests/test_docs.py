"""What the documents say: that links lead somewhere, code can be read, and commands have the options that are shown."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

import moeshard

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md", "tests/**/*.md",
                    "python/**/*.md", "third_party/llama.cpp/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?\)")
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, *languages: str) -> Iterator[str]:
    for indent, language, body in BLOCK.findall(text_of(document)):
        if language in languages:
            yield "\n".join(line.removeprefix(indent) for line in body.splitlines())


def prose(document: str) -> str:
    return BLOCK.sub("", text_of(document))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_there_are_documents() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/glossary.md", "docs/architecture.md"} <= set(
        DOCUMENTS
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", target):
            continue  # of the web
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target} is not there"
        if anchor:
            assert anchor in anchors(file), f"{document}: {path} has no heading {anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_can_be_read_and_its_names_are_there(document: str) -> None:
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moeshard":
                assert node.attr in moeshard.__all__, f"{document}: moeshard has no {node.attr}"


def test_shell_can_be_read() -> None:
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            done = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{document}: {block}\n{done.stderr}"


def commands(document: str) -> Iterator[list[str]]:
    """The calls of moeshard in a document, without what is on stdout."""
    lines = [line for block in blocks(document, "sh") for line in re.sub(r"\\\n", " ", block).splitlines()]
    for block in blocks(document, "console"):
        lines += [line[2:] for line in re.sub(r"\\\n", " ", block).splitlines() if line.startswith("$ ")]
    for line in lines:
        for part in re.split(r"&&|;|\|", line):
            if part.split()[:1] == ["moeshard"]:
                yield shlex.split(part, comments=True)[1:]


@cache
def command_line() -> dict[str, set[str]]:
    """Of each command, the options that it has."""
    from moeshard.cli.app import app

    group = typer.main.get_command(app)
    listed: dict[str, set[str]] = {}
    for name, command in getattr(group, "commands").items():  # noqa: B009
        names = [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
        listed[name] = {"--help", "-h", *names}
    return listed


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_their_options_are_there(document: str) -> None:
    for words in commands(document):
        assert words, f"{document}: moeshard without a command"
        if words[0].startswith("-"):
            assert words[0] in ("--help", "-h", "--version")
            continue
        assert words[0] in command_line(), f"{document}: there is no command moeshard {words[0]}"
        options = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        unknown = options - command_line()[words[0]]
        assert not unknown, f"{document}: moeshard {words[0]} has no {unknown}"


def test_readme_shows_every_command() -> None:
    shown = {words[0] for words in commands("README.md")}
    assert shown == set(command_line())
