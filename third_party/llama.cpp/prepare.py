"""Unpack the pinned llama.cpp and apply our patches.

    python prepare.py                  # third_party/llama.cpp/tree: pin + patches
    python prepare.py --stock DIR      # of the untouched pin, what our tests compare with
    python prepare.py --check          # is the tree in use exactly pin + patches?

The archive comes from pip, which also verifies its sha256. Without a network, set
MOESHARD_LLAMA_SDIST to a copy of the archive that pin.txt names.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import unified_diff

HERE = Path(__file__).resolve().parent
PIN = HERE / "pin.txt"
PATCHES = HERE / "patches"
TREE = HERE / "tree"
STAMP = ".moeshard-stamp"
SDIST_ENV = "MOESHARD_LLAMA_SDIST"

# Backends whose sources are unpacked: what is built by default, and the GPUs that a CMake option switches on.
BACKENDS = ("blas", "cpu", "cuda", "hip", "metal", "musa", "rpc", "vulkan")
# What the build reads, relative to vendor/llama.cpp: files, folders, and "*" for the files of a folder.
BUILD_PATHS = (
    "CMakeLists.txt",
    "LICENSE",
    "cmake",
    "ggml/CMakeLists.txt",
    "ggml/cmake",
    "ggml/include",
    "ggml/src/*",
    *(f"ggml/src/ggml-{backend}" for backend in BACKENDS),
    "include",
    "src",
)
# What the tests compile of the untouched pin.
TEST_PATHS = ("LICENSE", "include", "src", "tests/test-llama-archs.cpp")


class PrepareError(Exception):
    """Something a user can act on; printed without a traceback."""


def pin() -> tuple[str, str]:
    """Return the requirement (``name==version``) and the sha256 that pin.txt states."""
    match = re.search(r"^(\S+==\S+)\s+--hash=sha256:([0-9a-f]{64})$", PIN.read_text(), re.M)
    if not match:
        raise PrepareError(f"{PIN}: expected one line 'name==version --hash=sha256:<64 hex digits>'")
    return match[1], match[2]


def stamp(paths: tuple[str, ...]) -> str:
    """Identify a tree by all that decides its content."""
    digest = hashlib.sha256(repr((pin(), paths)).encode())
    for patch in sorted(PATCHES.glob("*.patch")):
        digest.update(patch.name.encode() + b"\0" + patch.read_bytes())
    return digest.hexdigest()


def check_archive(path: Path) -> Path:
    """Refuse an archive that is not the pinned one."""
    requirement, want = pin()
    if not path.is_file():
        raise PrepareError(f"{path}: no such file; it should be the source archive of {requirement}")
    with path.open("rb") as file:
        got = hashlib.sha256(file.read()).hexdigest()
    if got != want:
        raise PrepareError(
            f"{path}: wrong sha256 for {requirement}\n  expected {want}\n  got      {got}\n"
            "Delete the file and fetch it again; if the pin was changed on purpose, update pin.txt."
        )
    return path


@contextmanager
def archive() -> Iterator[Path]:
    """Yield the path of the verified source archive, downloading it where needed."""
    given = os.environ.get(SDIST_ENV)
    if given:
        yield check_archive(Path(given))
        return
    requirement, _ = pin()
    name = requirement.split("==")[0]
    with tempfile.TemporaryDirectory(prefix="moeshard-pin-") as tmp:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        command += ["--require-hashes", "--requirement", str(PIN), "--dest", tmp]
        print(f"moeshard: fetching {requirement} (about 77 MB)", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(tmp).glob("*.tar.gz"))
        if done.returncode != 0 or len(found) != 1:
            tail = "\n".join(f"  {line}" for line in (done.stderr + done.stdout).strip().splitlines()[-8:])
            raise PrepareError(
                f"could not fetch {requirement} with pip:\n{tail}\n"
                "If there is no network here, fetch that source archive elsewhere\n"
                f"  (pip download --no-deps --no-binary {name} {requirement})\n"
                f"and set {SDIST_ENV} to its path. If pip reports a hash mismatch, the download is not the pinned file."
            )
        yield check_archive(found[0])


def covers(path: str, inner: PurePosixPath) -> bool:
    """Does this entry of an allow list cover the file `inner`?"""
    if path.endswith("/*"):
        return inner.parent == PurePosixPath(path[:-2])
    return inner.is_relative_to(path)


def unpack(source: Path, paths: tuple[str, ...], dest: Path) -> None:
    """Extract the allow-listed files of vendor/llama.cpp from the archive to `dest`."""
    with tarfile.open(source) as tar:
        for member in tar:
            # NAME-VERSION/vendor/llama.cpp/...
            parts = PurePosixPath(member.name).parts
            if parts[1:3] != ("vendor", "llama.cpp") or not member.isfile():
                continue
            inner = PurePosixPath(*parts[3:])
            if ".." in parts or not any(covers(path, inner) for path in paths):
                continue
            content = tar.extractfile(member)
            assert content is not None  # isfile() above
            target = dest / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("wb") as out:
                shutil.copyfileobj(content, out)
            target.chmod(member.mode & 0o777)
    missing = [path for path in paths if not any(dest.glob(path))]
    if missing:
        raise PrepareError(f"{source}: lacks vendor/llama.cpp/{', '.join(missing)}; is this the pinned archive?")


def apply_patches(tree: Path) -> None:
    """Apply patches/*.patch in order; any hunk that does not fit exactly is an error."""
    for path in sorted(PATCHES.glob("*.patch")):
        try:
            unified_diff.apply(path.read_bytes().decode(), tree)
        except unified_diff.DiffError as err:
            raise PrepareError(
                f"{path.name} does not apply to {pin()[0]}.\n{err}\n"
                f"Make the patch again for this pin: the recipe is in {HERE / 'README.md'}."
            ) from err


def make_tree(dest: Path, paths: tuple[str, ...], *, patched: bool) -> bool:
    """Create `dest` whole or not at all; return False when it is already there and current."""
    want = stamp(paths) if patched else repr((pin(), paths))
    mark = dest / STAMP
    if mark.is_file() and mark.read_text() == want:
        return False
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}-", dir=dest.parent) as tmp:
        fresh = Path(tmp) / "tree"
        with archive() as source:
            unpack(source, paths, fresh)
        if patched:
            apply_patches(fresh)
        keep_unchanged_times(dest, fresh)
        (fresh / STAMP).write_text(want)
        if dest.exists():
            shutil.rmtree(dest)
        fresh.rename(dest)
    return True


def keep_unchanged_times(old: Path, new: Path) -> None:
    """Give files that did not change their old mtime, so that a new patch rebuilds only what it touches."""
    if not old.is_dir():
        return
    for path in files(new):
        before = old / path.relative_to(new)
        if before.is_file() and filecmp.cmp(before, path, shallow=False):
            shutil.copystat(before, path)


def files(tree: Path) -> list[Path]:
    return sorted(path for path in tree.rglob("*") if path.is_file() and path.name != STAMP)


def differences(tree: Path, paths: tuple[str, ...] = BUILD_PATHS) -> list[str]:
    """List how `tree` differs from pin + patches; empty when it does not."""
    with tempfile.TemporaryDirectory(prefix="moeshard-check-") as tmp:
        fresh = Path(tmp) / "tree"
        with archive() as source:
            unpack(source, paths, fresh)
        apply_patches(fresh)
        want = {path.relative_to(fresh).as_posix(): path for path in files(fresh)}
        have = {path.relative_to(tree).as_posix(): path for path in files(tree)}
        out = [f"missing: {name}" for name in sorted(want.keys() - have.keys())]
        out += [f"not in the pin: {name}" for name in sorted(have.keys() - want.keys())]
        common = sorted(want.keys() & have.keys())
        out += [f"changed: {name}" for name in common if not filecmp.cmp(want[name], have[name], shallow=False)]
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", type=Path, metavar="DIR", help="write what the tests need of the untouched pin here")
    parser.add_argument("--check", action="store_true", help="compare the tree in use with pin + patches")
    args = parser.parse_args(argv)
    try:
        if args.check:
            found = differences(TREE)
            print("\n".join(found) if found else f"{TREE}: is exactly {pin()[0]} + patches")
            return 1 if found else 0
        if args.stock:
            make_tree(args.stock, TEST_PATHS, patched=False)
        else:
            make_tree(TREE, BUILD_PATHS, patched=True)
    except (PrepareError, OSError, tarfile.TarError) as err:
        print(f"moeshard: preparing llama.cpp failed: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
