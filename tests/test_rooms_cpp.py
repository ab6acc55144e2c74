"""The rooms of csrc: a file includes headers of its own room and of rooms below it, never of one above.

The order is the list ROOMS of csrc/CMakeLists.txt; bindings/ lies on top of it. A public header belongs to the room
that implements it, so including one counts as including that room.
"""

from __future__ import annotations

import re
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
# error.hpp is the ground that all stand on.
PUBLIC = {
    "error.hpp": "include",
    "gguf.hpp": "gguf",
    "quantize.hpp": "gguf",
    "keep.hpp": "moe",
    "moe_layout.hpp": "moe",
    "segments.hpp": "files",
    "write.hpp": "files",
    "shard.hpp": "shard",
    "memory.hpp": "engine",
    "trace.hpp": "engine",
    "batcher.hpp": "runtime",
    "context.hpp": "runtime",
    "expert_mask.h": "runtime",
    "generation.hpp": "runtime",
    "model.hpp": "runtime",
    "process.hpp": "runtime",
    "sampler.hpp": "runtime",
    "statistics.hpp": "runtime",
    "step_queue.hpp": "runtime",
    "worker.hpp": "runtime",
}
# What of llama.cpp every room may see. The rest is private to it, and for engine/ alone.
LLAMA = {"ggml.h", "ggml-backend.h", "ggml-cpu.h", "ggml-rpc.h", "gguf.h", "llama.h"}
INCLUDE = re.compile(r'^\s*#\s*include "([^"]+)"', re.MULTILINE)


def rooms(csrc: Path) -> list[str]:
    """All rooms, from the ground up."""
    match = re.search(r"^set\(ROOMS ([a-z ]+)\)$", (csrc / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert match, "csrc/CMakeLists.txt does not list the rooms"
    return ["include", *match[1].split(), "bindings"]


def sources(csrc: Path) -> list[Path]:
    return sorted(path for path in csrc.rglob("*") if path.suffix in (".cpp", ".hpp", ".h"))


def room_of(name: str) -> str:
    """The room of a file, by its path below csrc or below csrc/include."""
    name = name.removeprefix("include/")
    return PUBLIC[name.removeprefix("moeshard/")] if name.startswith("moeshard/") else name.split("/")[0]


def includes(csrc: Path) -> dict[str, list[str]]:
    """Path below csrc -> what it includes, written in the same way where it is ours."""
    found = {}
    for path in sources(csrc):
        names = INCLUDE.findall(path.read_text())
        public = [f"include/{name}" if name.startswith("moeshard/") else name for name in names]
        found[path.relative_to(csrc).as_posix()] = public
    return found


def complaints(csrc: Path) -> list[str]:
    """Every include that the order of the rooms forbids."""
    order = {room: height for height, room in enumerate(rooms(csrc))}
    graph = includes(csrc)
    bad = []
    for name, used in graph.items():
        room = room_of(name)
        for header in used:
            if header in graph:
                if order[room_of(header)] > order[room]:
                    bad.append(f"{name} includes {header}: {room} lies below {room_of(header)}")
            elif header not in LLAMA and (room != "engine" or "/" in header):
                bad.append(f"{name} includes {header}: no file of csrc, and no public header of llama.cpp")
    return bad


def check_cycles(csrc: Path) -> None:
    graph = includes(csrc)
    TopologicalSorter({name: [header for header in used if header in graph] for name, used in graph.items()}).prepare()


def test_every_folder_is_a_room() -> None:
    assert {path.relative_to(CSRC).parts[0] for path in sources(CSRC)} == set(rooms(CSRC))


def test_every_public_header_has_a_room() -> None:
    assert {path.name for path in (CSRC / "include" / "moeshard").iterdir()} == PUBLIC.keys()


def test_no_include_runs_up() -> None:
    assert complaints(CSRC) == []


def test_no_files_include_each_other() -> None:
    check_cycles(CSRC)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(CSRC, tmp_path / "csrc")
    return tmp_path / "csrc"


def add_include(csrc: Path, name: str, header: str) -> None:
    with (csrc / name).open("a") as file:
        file.write(f'#include "{header}"\n')


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("moe/keep.cpp", "shard/facts.hpp"),
        ("engine/control.hpp", "moeshard/context.hpp"),
        ("include/moeshard/keep.hpp", "moeshard/segments.hpp"),
        ("shard/shard.cpp", "bindings/arrays.hpp"),
        ("runtime/model.cpp", "llama-model.h"),
        ("runtime/model.cpp", "guard.hpp"),
    ],
)
def test_wrong_include_is_found(name: str, header: str, copy: Path) -> None:
    add_include(copy, name, header)
    [complaint] = complaints(copy)
    assert name in complaint and header in complaint


def test_cycle_is_found(copy: Path) -> None:
    add_include(copy, "include/moeshard/keep.hpp", "moeshard/moe_layout.hpp")  # of one room, and includes keep.hpp
    with pytest.raises(CycleError):
        check_cycles(copy)
