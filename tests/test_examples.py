"""Every example runs as its first lines say, and shows what it is there to show."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moeshard

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that two_nodes.py makes, and what it prints."""
    folder = tmp_path_factory.mktemp("nodes")
    return folder, run("two_nodes.py", "-o", folder)


def test_a_mask(tinymoe: Path) -> None:
    out = run("mask_in_ten_lines.py", tinymoe)
    highest = dict(re.findall(r"(all experts|the first half): experts \d+ to (\d+) of 128", out))
    assert int(highest["the first half"]) < 64 <= int(highest["all experts"])
    change = re.search(r"moves logits by up to ([\d.]+)", out)
    assert change is not None
    assert float(change[1]) > 1


def test_ten_lines() -> None:
    tree = ast.parse((EXAMPLES / "mask_in_ten_lines.py").read_text())
    lines = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    counted = [node for node in lines if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(counted) - 1 <= 10  # without the text on top


def test_a_profile_of_chats(tmp_path: Path) -> None:
    files = []
    for name in ("de", "py"):
        text = moeshard.embedded_text(name)
        turns = [(text[at : at + 400], text[at + 400 : at + 600]) for at in range(0, 2000, 400)]
        chats = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
            for asked, answered in turns
        ]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, chats)) + "\n")
    out = run("profile_my_chats.py", *files, "-o", tmp_path / "profile.npz")
    profile = moeshard.read_profile(tmp_path / "profile.npz")
    assert profile.domains == ["de", "py"]
    assert profile.domain.tolist().count(0) >= 5
    assert f"{profile.n_tokens.sum()} tokens" in out
    shares = {name: int(share) for name, share in re.findall(r"(\w+): a quarter .* has (\d+)%", out)}
    assert shares.keys() == {"de", "py"}
    assert all(25 < share < 100 for share in shares.values())


def test_two_nodes(nodes: tuple[Path, str]) -> None:
    folder, out = nodes
    plan = moeshard.read_plan(folder / "plan.json")
    assert [int(node.keep[0].sum()) for node in plan.nodes] == [64, 64]
    assert len(set(re.findall(r"is best at (\w+)", out))) == 2
    assert len(re.findall(r"64 of 128 experts, \d+% of the bytes, verified", out)) == 2
    assert [moeshard.Model(folder / f"tinymoe.{node.name}.gguf").n_expert for node in plan.nodes] == [64, 64]


def test_placed_and_answered(nodes: tuple[Path, str]) -> None:
    german = moeshard.embedded_text("de")[:600]
    out = run("place_then_answer.py", nodes[0] / "plan.json", german, "too short")
    first, second = re.findall(r"^    (.+): '", out, flags=re.MULTILINE)
    captured = {node.name: node.facts["captured"]["de"] for node in moeshard.read_plan(nodes[0] / "plan.json").nodes}
    assert first == max(captured, key=lambda name: captured[name])
    assert second == "the whole model"


def test_every_example_is_listed_and_run() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    listed = set(re.findall(r"\]\(([\w.]+)/?\)", (EXAMPLES / "README.md").read_text()))
    tests = Path(__file__).read_text() + (Path(__file__).parent / "packaging" / "test_install.py").read_text()
    assert names <= listed
    assert all(f'"{name}"' in tests for name in names)
