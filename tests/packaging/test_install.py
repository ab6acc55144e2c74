"""What users get: the wheel, the source distribution, an installation of it, and the C++ library inside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONSUMER = Path(__file__).parent / "consumer"
MODEL = ROOT / "python" / "moeshard" / "data" / "tinymoe.gguf"
MAX_WHEEL_BYTES = 25 << 20

pytestmark = pytest.mark.packaging


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    """Run a command that must succeed, and return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel of the source tree, made in its own build directory."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, ROOT)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    return next(out.glob("*.tar.gz"))


@dataclass(frozen=True)
class Installed:
    python: Path
    bin: Path


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the source distribution where nothing is, without the archive that llama.cpp comes from."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", sdist, MOESHARD_LLAMA_SDIST="/there/is/no/archive")
    return Installed(python, home / "bin")


def test_wheel_holds_our_files_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    extension = {name for name in names if re.fullmatch(r"moeshard/_core\.[^/]*\.so", name)}
    python = {
        path.relative_to(ROOT / "python").as_posix()
        for path in (ROOT / "python" / "moeshard").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".dylib")
    }
    headers = {
        f"moeshard/include/{path.relative_to(ROOT / 'csrc' / 'include').as_posix()}"
        for path in (ROOT / "csrc" / "include").rglob("*.h*")
    }
    library = {"moeshard/lib/libmoeshard.so", "moeshard/lib/libmoeshard.dylib"} & names
    config = {f"moeshard/lib/cmake/moeshard/moeshard-config{part}.cmake" for part in ("", "-release", "-version")}
    metadata = {name for name in names if ".dist-info/" in name}
    assert len(extension) == len(library) == 1
    assert names == extension | python | headers | library | config | metadata
    licenses = {name.split(".dist-info/licenses/")[1] for name in metadata if "/licenses/" in name}
    assert licenses == {"LICENSE", "third_party/llama.cpp/LICENSE"}


def test_wheel_is_small_and_stripped(wheel: Path, tmp_path: Path) -> None:
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    if not shutil.which("nm"):
        return
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                symbols = run("nm", archive.extract(name, tmp_path))
                assert symbols.strip().endswith("no symbols")


def test_wheel_names_no_folder_of_this_machine(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            assert str(ROOT).encode() not in archive.read(name), name


def test_sdist_is_what_a_release_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {"/".join(member.name.split("/")[1:]) for member in archive if member.isfile()}
    tops = {name.split("/")[0] for name in names}
    assert tops == {"CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "cmake", "csrc", "pyproject.toml", "python",
                    "third_party"}  # fmt: skip
    assert {name.split("/")[1] for name in names if name.startswith("third_party/")} == {"llama.cpp"}
    tree = ROOT / "third_party" / "llama.cpp" / "tree"
    # Patched, and with the mark that says so: no build of it unpacks the pin again.
    expected = {path.relative_to(ROOT).as_posix() for path in tree.rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("third_party/llama.cpp/tree/")} == expected
    assert "third_party/llama.cpp/tree/.moeshard-stamp" in names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o", ".a", ".orig"))]


def test_installed_from_sdist(installed: Installed, tmp_path: Path) -> None:
    program = """
import moeshard
model = moeshard.Model(moeshard.embedded_model())
keep = model.keep("0-63")
print(len("".join(model.generate("Once upon a time", keep=keep, max_tokens=8))) > 0)
"""
    assert run(installed.python, "-c", program, cwd=tmp_path).strip() == "True"
    assert "moeshard" in run(installed.bin / "moeshard", "--help", cwd=tmp_path)


def build(installed: Installed, source: Path, out: Path, *options: str) -> None:
    """Build a C++ program that knows only the installed package."""
    if not shutil.which("cmake"):
        run(installed.python, "-m", "pip", "install", "cmake")
    path = f"{os.environ['PATH']}{os.pathsep}{installed.bin}"
    package = run(installed.python, "-c", "import moeshard; print(moeshard.cmake_dir())", cwd=out.parent).strip()
    run("cmake", "-S", source, "-B", out, f"-Dmoeshard_DIR={package}", *options, PATH=path)
    run("cmake", "--build", out, PATH=path)


def test_cpp_program_uses_the_installed_library(installed: Installed, tmp_path: Path) -> None:
    # Programs that use llama.cpp's own API as well take its headers from the source distribution.
    tree = ROOT / "third_party" / "llama.cpp" / "tree"
    shutil.copytree(CONSUMER, tmp_path / "consumer")
    build(installed, tmp_path / "consumer", tmp_path / "out", f"-DLLAMA_TREE={tree}")
    assert "all kept" in run(tmp_path / "out" / "consumer", MODEL)
    assert "FAILED" not in run(tmp_path / "out" / "c_api", MODEL)


def test_cpp_example(installed: Installed, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "cpp", tmp_path / "cpp")
    build(installed, tmp_path / "cpp", tmp_path / "out")
    printed = run(tmp_path / "out" / "half", MODEL)
    assert "the same answer" in printed
    used, whole = map(int, re.findall(r"(\d+) of (\d+) bytes", printed)[0])
    assert used < 0.7 * whole
