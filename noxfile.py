"""What is run by hand and by CI: `nox -s lint`, `nox -s tests -- tests/gguf`; `nox -l` lists all sessions.

Versions of tools stand in pyproject.toml (extra `dev`) and nowhere else.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.reuse_venv = "yes"
# Beside the other things that are built, where git and ruff do not look.
nox.options.envdir = "build/nox"

PROJECT: dict[str, Any] = nox.project.load_toml("pyproject.toml")["project"]
FORMATTED = ("csrc", "examples", "tests")
BENCHMARKS = ("start_up.py", "engine_cost.py", "analyze_speed.py")


def requirements(*extras: str) -> list[str]:
    """What these extras need, but for the package itself; the extras that they name included."""
    found: list[str] = []
    for requirement in (line for extra in extras for line in PROJECT["optional-dependencies"][extra]):
        own = re.fullmatch(r"moeshard\[([\w,]+)\]", requirement)
        found += requirements(*own[1].split(",")) if own else [requirement]
    return found


def tools(*names: str) -> list[str]:
    """The tools of these names as the extra `dev` asks for them."""
    by_name = {re.split(r"[^\w-]", line, maxsplit=1)[0]: line for line in requirements("dev")}
    return [by_name[name] for name in names]


def readme_command() -> str:
    """The line of the README that builds and tests."""
    found = re.search(r"^pip install .*MOESHARD_TESTS=ON.*pytest$", Path("README.md").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise LookupError("README.md shows no test command")
    return found[0]


def tracked(session: nox.Session, *patterns: str) -> list[str]:
    """The files that git knows by these patterns."""
    return str(session.run("git", "ls-files", *patterns, external=True, silent=True, log=False)).split()


def build(session: nox.Session, extras: str, *options: str) -> None:
    """Install the package in place. All sessions and `pip install` share one build folder: what is there is used."""
    defines = [argument for option in ("MOESHARD_TESTS=ON", *options) for argument in ("-C", f"cmake.define.{option}")]
    session.install("-e", f".[{extras}]" if extras else ".", *defines)


@nox.session
def lint(session: nox.Session) -> None:
    """Check lines, names and formats: ruff and clang-format."""
    session.install(*tools("ruff", "clang-format"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = tracked(session, *(f"{folder}/*.{kind}" for folder in FORMATTED for kind in ("cpp", "hpp", "h")))
    session.log(f"clang-format --dry-run -Werror: {len(sources)} files")
    session.run("clang-format", "--dry-run", "-Werror", *sources, log=False)


@nox.session
def types(session: nox.Session) -> None:
    """Check types: mypy, strict. Nothing is built: the stubs of the native module are part of the source."""
    session.install(*PROJECT["dependencies"], *requirements("dev"))
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Check what the documents say of files, commands, options and Python."""
    build(session, "")
    session.install(*tools("pytest"))
    session.run("pytest", "-q", "tests/test_docs.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the README's test command; arguments are for pytest."""
    session.run("sh", "-c", f"{readme_command()} {shlex.join(session.posargs)}", external=True)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run tests with AddressSanitizer and UBSan; arguments are for pytest."""
    build(session, "test", "MOESHARD_ASAN=ON")
    session.run("tests/sanitizers/run.sh", *session.posargs, external=True)


@nox.session
def portable(session: nox.Session) -> None:
    """Run the engine's tests with an engine built for SSE4.2 and nothing newer; arguments as for the script."""
    session.run("tests/portable/run.sh", *session.posargs, external=True)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz the readers and writers of files, for a minute unless arguments say otherwise."""
    build(session, "", "MOESHARD_ASAN=ON")
    session.run("tests/fuzz/run.sh", *(session.posargs or ("--seconds", "60")), external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure speed on the embedded model, or run one benchmark: `nox -s bench -- split_speed.py --layers 2`."""
    session.install("-e", ".[bench]")
    for arguments in [session.posargs] if session.posargs else [[name] for name in BENCHMARKS]:
        session.run("python", f"benchmarks/{arguments[0]}", *arguments[1:])


@nox.session
def tidy(session: nox.Session) -> None:
    """Run clang-tidy over csrc, or over the files that arguments name."""
    build(session, "")
    session.install(*tools("clang-tidy"))
    tag = session.run("python", "-c", "import sys; print('cp%d%d' % sys.version_info[:2])", silent=True)
    database = next(Path("build").glob(f"{str(tag).strip()}-*/compile_commands.json")).parent
    sources = session.posargs or tracked(session, "csrc/*.cpp")
    session.log(f"clang-tidy: {len(sources)} files")
    session.run("clang-tidy", "--quiet", "-p", str(database), *sources, log=False)
