"""third_party/llama.cpp/prepare.py: what it makes, and what it says when it cannot.

Most tests give it a small archive of their own, laid out like the pinned one.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REAL = Path(__file__).parents[2] / "third_party" / "llama.cpp"
NAME = "llama_cpp_python-0.3.36"
SOURCE = "".join(f"line {number}\n" for number in range(1, 21))
PATCH = """What it is for.

--- a/src/llama-graph.cpp
+++ b/src/llama-graph.cpp
@@ -2,3 +2,4 @@
 line 2
 line 3
+ours
 line 4
@@ -17,3 +18,2 @@
 line 17
-line 18
 line 19
"""
FILES = {
    "CMakeLists.txt": "",
    "LICENSE": "MIT\n",
    "cmake/common.cmake": "",
    "ggml/CMakeLists.txt": "",
    "ggml/cmake/common.cmake": "",
    "ggml/include/ggml.h": "",
    "ggml/src/ggml.c": "",
    **{f"ggml/src/ggml-{b}/b.cpp": "" for b in ("blas", "cpu", "cuda", "hip", "metal", "musa", "rpc", "vulkan")},
    "include/llama.h": "",
    "src/llama-graph.cpp": SOURCE,
    "tests/test-llama-archs.cpp": "",
}
UNWANTED = {"ggml/src/ggml-webgpu/x.cpp": "", "tools/server/x.cpp": "", "app/CMakeLists.txt": "", "src/../../x": ""}


class Project:
    """A copy of third_party/llama.cpp with its own pin."""

    def __init__(self, root: Path):
        self.home = root / "llama.cpp"
        self.archive = root / f"{NAME}.tar.gz"
        self.tree = self.home / "tree"
        self.home.mkdir()
        for script in REAL.glob("*.py"):
            shutil.copy(script, self.home)
        (self.home / "patches").mkdir()
        self.pack({**FILES, **UNWANTED})
        self.patch(PATCH)

    def pack(self, files: dict[str, str]) -> None:
        with tarfile.open(self.archive, "w:gz") as tar:
            for name, text in files.items():
                info = tarfile.TarInfo(f"{NAME}/vendor/llama.cpp/{name}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
        digest = hashlib.sha256(self.archive.read_bytes()).hexdigest()
        (self.home / "pin.txt").write_text(f"llama-cpp-python==0.3.36 --hash=sha256:{digest}\n")

    def patch(self, text: str, name: str = "0001-ours.patch") -> None:
        (self.home / "patches" / name).write_text(text)

    def run(self, *args: str, archive: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name != "MOESHARD_LLAMA_SDIST"}
        if archive:
            clean["MOESHARD_LLAMA_SDIST"] = str(self.archive)
        command = [sys.executable, str(self.home / "prepare.py"), *args]
        return subprocess.run(command, env={**clean, **env}, capture_output=True, text=True, check=False)

    def refuses(self, *words: str, archive: bool = True, **env: str) -> None:
        """Check that preparing fails with one message that holds the words, and leaves nothing behind."""
        before = sorted(self.home.iterdir())
        done = self.run(archive=archive, **env)
        assert done.returncode == 1, done
        assert "Traceback" not in done.stderr
        for word in words:
            assert word in done.stderr
        assert [path for path in sorted(self.home.iterdir()) if path.name != "__pycache__"] == [
            path for path in before if path.name != "__pycache__"
        ]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def names(tree: Path) -> set[str]:
    return {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}


def test_tree_in_use_is_pin_and_patches() -> None:
    done = subprocess.run(
        [sys.executable, str(REAL / "prepare.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_license_is_that_of_the_tree() -> None:
    # Committed, because the metadata of a build needs it before the tree is unpacked.
    assert (REAL / "LICENSE").read_text().startswith((REAL / "tree" / "LICENSE").read_text())


def test_unpacks_what_is_needed_and_patches_it(project: Project) -> None:
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert names(project.tree) == set(FILES) - {"tests/test-llama-archs.cpp"} | {".moeshard-stamp"}
    lines = SOURCE.splitlines()
    expected = [*lines[:3], "ours", *lines[3:17], *lines[18:]]
    assert (project.tree / "src/llama-graph.cpp").read_text().splitlines() == expected
    assert not (project.home.parent / "x").exists()


def test_second_run_does_nothing(project: Project) -> None:
    project.run()
    before = {path: path.stat().st_mtime_ns for path in project.tree.rglob("*")}
    project.archive.unlink()
    assert project.run().returncode == 0
    assert {path: path.stat().st_mtime_ns for path in project.tree.rglob("*")} == before


def test_changed_patch_rebuilds_only_what_it_touches(project: Project) -> None:
    project.run()
    for path in project.tree.rglob("*"):
        os.utime(path, (1e9, 1e9))
    project.patch(PATCH.replace("+ours", "+ours, changed"))
    assert project.run().returncode == 0
    touched = [path.name for path in project.tree.rglob("*") if path.is_file() and path.stat().st_mtime != 1e9]
    assert sorted(touched) == [".moeshard-stamp", "llama-graph.cpp"]
    assert "ours, changed" in (project.tree / "src/llama-graph.cpp").read_text()


def test_failure_keeps_the_old_tree(project: Project) -> None:
    project.run()
    project.patch(PATCH.replace("line 17", "line seventeen"))
    assert project.run().returncode == 1
    assert "ours" in (project.tree / "src/llama-graph.cpp").read_text()


def test_stock_is_not_patched(project: Project, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    assert project.run("--stock", str(stock)).returncode == 0
    assert (stock / "src/llama-graph.cpp").read_text() == SOURCE
    assert (stock / "tests/test-llama-archs.cpp").exists()


def test_check_names_what_differs(project: Project) -> None:
    project.run()
    assert project.run("--check").returncode == 0
    (project.tree / "src/llama-graph.cpp").write_text("other")
    (project.tree / "src/extra.cpp").write_text("")
    (project.tree / "LICENSE").unlink()
    done = project.run("--check")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "missing: LICENSE",
        "not in the pin: src/extra.cpp",
        "changed: src/llama-graph.cpp",
    ]


def test_wrong_hash(project: Project) -> None:
    project.archive.write_bytes(project.archive.read_bytes()[:-1])
    project.refuses("wrong sha256", "expected", "Delete the file and fetch it again")


def test_missing_archive(project: Project) -> None:
    project.archive.unlink()
    project.refuses("no such file", "llama-cpp-python==0.3.36")


def test_no_network(project: Project, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    project.refuses(
        "could not fetch llama-cpp-python==0.3.36",
        "If there is no network here",
        "MOESHARD_LLAMA_SDIST",
        archive=False,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(empty),
    )


def test_corrupt_download(project: Project, tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / project.archive.name).write_bytes(b"not what was pinned")
    project.refuses(
        "could not fetch llama-cpp-python==0.3.36",
        "hash mismatch",
        archive=False,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(served),
    )


def test_archive_without_llama_cpp(project: Project) -> None:
    project.pack({"README.md": ""})
    project.refuses("lacks vendor/llama.cpp/CMakeLists.txt", "is this the pinned archive?")


def test_no_archive_at_all(project: Project) -> None:
    project.archive.write_bytes(b"not a tar file")
    digest = hashlib.sha256(b"not a tar file").hexdigest()
    (project.home / "pin.txt").write_text(f"llama-cpp-python==0.3.36 --hash=sha256:{digest}\n")
    project.refuses("preparing llama.cpp failed")


def test_malformed_pin(project: Project) -> None:
    (project.home / "pin.txt").write_text("llama-cpp-python==0.3.36\n")
    project.refuses("pin.txt", "expected one line")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        pytest.param(SOURCE.replace("line 17", "line seventeen"), "line 17:", id="context differs"),
        pytest.param("\n" + SOURCE, "line 2:", id="shifted by a line"),
        pytest.param(SOURCE.replace("line 3\n", "line 3\nours\n"), "line 4:", id="a hunk is already there"),
        pytest.param("line 1\nline 2\n", "(end of file)", id="file too short"),
        pytest.param(SOURCE.replace("\n", "\r\n"), "line 2:", id="other line ends"),
        pytest.param(SOURCE.replace("line 1\n", "line\f1\n").replace("line 18", "line eighteen"), "line 18:", id="\\f"),
    ],
)
def test_patch_that_no_longer_fits(project: Project, source: str, says: str) -> None:
    project.pack({**FILES, "src/llama-graph.cpp": source})
    project.refuses("0001-ours.patch does not apply", "src/llama-graph.cpp", says, "README.md")


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        pytest.param(PATCH.replace("src/llama-graph", "src/gone"), "no such file", id="no file"),
        pytest.param(PATCH.replace("a/src", "a/../src").replace("b/src", "b/../src"), "begins with a/", id="outside"),
        pytest.param(PATCH.rsplit("\n", 2)[0] + "\n", "is cut short", id="cut"),
        pytest.param(PATCH.replace("-2,3 +2,4", "-2,3 +2,3"), "more lines than it says", id="wrong counts"),
        pytest.param("nothing but words\n", "no changes found", id="empty"),
        pytest.param(PATCH.replace("+++ b/src", "+++ b/include"), "follows", id="two names"),
    ],
)
def test_malformed_patch(project: Project, patch: str, says: str) -> None:
    project.patch(patch)
    project.refuses("0001-ours.patch does not apply", says)


def test_patches_apply_in_order(project: Project) -> None:
    project.patch(
        "--- a/src/llama-graph.cpp\n+++ b/src/llama-graph.cpp\n@@ -3,2 +3,2 @@\n line 3\n-ours\n+ours, twice\n",
        "0002-again.patch",
    )
    assert project.run().returncode == 0
    assert "ours, twice" in (project.tree / "src/llama-graph.cpp").read_text()
