"""Every architecture of the pin with experts is compared, and docs/architectures.md says what came of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import reference
import results
from specimens import ARCHITECTURES, MISSING, SOURCES, SPECIMENS, UNUSED, VARIANTS


def test_the_reference_is_stock(programs: Path) -> None:
    """No patched object of llama.cpp was linked into the programs: those call into moeshard::hook."""
    for name in ("oracle", "zoo"):
        assert b"8moeshard4hook" not in (programs / name).read_bytes()


def test_no_architecture_is_forgotten(programs: Path, tmp_path: Path) -> None:
    """zoo tries all architectures that llama.cpp knows; a newer pin may know more."""
    listed = subprocess.run([programs / "zoo", "--list"], check=True, capture_output=True, text=True).stdout.split()
    with_experts = {name for name in listed if reference.make_model(programs, name, tmp_path / "model.gguf") == 0}
    assert with_experts == {*ARCHITECTURES, *VARIANTS, *UNUSED}
    assert MISSING.keys() <= set(listed)


def test_every_source_file_that_routes_has_a_specimen(programs: Path) -> None:
    def plain(name: str) -> str:
        return name.replace("-", "").replace("_", "")

    sources = sorted((reference.stock_tree(programs) / "src" / "models").glob("*.cpp"))
    routing = {path.stem for path in sources if "build_moe_ffn(" in path.read_text()}
    known = {plain(name) for name in (*ARCHITECTURES, *MISSING)}
    assert {stem for stem in routing if plain(SOURCES.get(stem, stem)) not in known} == set()


def test_the_document_is_current(request: pytest.FixtureRequest, table: dict[str, dict[str, str]]) -> None:
    """Runs last (see conftest.py): it needs the results of all other tests."""
    complete = set(table) == set(SPECIMENS) and all(set(row) == set(results.COLUMNS) for row in table.values())
    if not complete:
        pytest.skip("only a part of the comparisons ran")
    text = results.document(table)
    if request.config.getoption("--rewrite-architectures", default=False):
        results.DOCUMENT.write_text(text)
    assert results.DOCUMENT.read_text() == text, "run pytest tests/exactness --rewrite-architectures"
