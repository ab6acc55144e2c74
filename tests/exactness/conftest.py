"""Fixtures of the exactness tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import reference
import results

TABLE = pytest.StashKey[dict[str, dict[str, str]]]()


# Known to pytest only when this folder is named on its command line.
def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-architectures", action="store_true", help="write docs/architectures.md from this run's results"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name == "test_the_document_is_current")


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> dict[str, dict[str, str]]:
    """Results by specimen and column, as far as the tests have come."""
    return pytestconfig.stash[TABLE]


@pytest.fixture(scope="session")
def programs() -> Path:
    return reference.programs()


@pytest.fixture(scope="session")
def make(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a specimen's name, and another type of its experts if wanted, to its file."""
    folder = tmp_path_factory.mktemp("zoo")

    def make(name: str, experts: str | None = None) -> Path:
        path = folder / (f"{name}.{experts}.gguf" if experts else f"{name}.gguf")
        if not path.exists() and (code := reference.make_model(programs, name, path, experts)) != 0:
            raise RuntimeError(f"zoo could not make {name}: exit code {code}")
        return path

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[TABLE]
    if found:
        terminalreporter.section("architectures")
        terminalreporter.write_line("\n".join(results.summary(found)))
