"""The rooms of python/moeshard: each uses only rooms below it, and no folder takes a public function's name."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeshard

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "moeshard"
PICTURE = ROOT / "docs" / "architecture.md"


def floors() -> list[set[str]]:
    """Read the picture in docs/architecture.md: the rooms of each floor, the highest first."""
    text = PICTURE.read_text(encoding="utf-8")
    picture = re.search(r"^```rooms\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert picture is not None, "docs/architecture.md has no block ```rooms"
    return [
        {room.strip(" /") for room in line.partition("  ")[0].split("·")}
        for line in picture.group(1).splitlines()
        if line.strip()
    ]


def room_of(module: str) -> str:
    """Return the folder or file below the package that a module lies in; itself for the package's face."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "moeshard"


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module of every import of the package, those within functions and for types only included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.split(".")[0] == "moeshard")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moeshard":
            assert node.level == 0
            yield node.lineno, node.module


SOURCES = sorted(PACKAGE.rglob("*.py"))
FLOOR = {room: height for height, rooms in enumerate(reversed(floors())) for room in rooms}


def test_the_picture_names_every_room() -> None:
    found = {room_of(module_of(path)) for path in SOURCES} - {"moeshard"}
    assert found == set(FLOOR) - {"_core"}


def test_imports_run_down() -> None:
    up = []
    for path in SOURCES:
        room = room_of(module_of(path))
        if room == "moeshard":
            continue  # the face: it looks names up wherever they are
        for line, module in imports(path):
            target = room_of(module)
            # The command line and the entry point use the package as everybody does: through its face.
            allowed = target == room or (target == "moeshard" and room in ("cli", "__main__"))
            if not allowed and (target not in FLOOR or FLOOR[target] >= FLOOR[room]):
                up.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {module}")
    assert not up, "\n".join(up)


def test_modules_of_a_room_do_not_import_each_other_in_circles() -> None:
    uses = {
        module_of(path): {
            module
            for _, module in imports(path)
            if (PACKAGE.parent / module.replace(".", "/")).with_suffix(".py").exists()
        }
        for path in SOURCES
        if module_of(path) != "moeshard"
    }
    below: dict[str, int] = {}

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in below:
            for target in uses.get(module, ()):
                visit(target, (*above, module))
            below[module] = 1

    for module in uses:
        visit(module, ())


@pytest.mark.parametrize("name", [name for name in moeshard.__all__ if name != "__version__"])
def test_no_folder_has_the_name_of_something_public(name: str) -> None:
    # Importing such a folder or file would put the module in the place of the function on the package.
    assert not (PACKAGE / name).exists() and not (PACKAGE / f"{name}.py").exists()
    assert getattr(moeshard, name) is getattr(importlib.import_module(moeshard._HOME[name]), name)


def test_the_face_names_everything_once_for_each_reader() -> None:
    # For people and `import *`, for the lazy look-up, and for type checkers.
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert typed == moeshard._HOME
    assert sorted({*typed, "__version__"}) == moeshard.__all__


def test_no_file_is_over_400_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for folder in ("python/moeshard", "csrc", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".hpp", ".h")  # the stub of the native module is one list of what it has
        and (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
