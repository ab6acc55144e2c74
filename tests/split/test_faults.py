"""What goes wrong while shards are written: an error that says so, never a signal, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_scripts import PRELUDE, run, sizeable_model
from shard_files import refused, small_source

import moeshard
from moeshard import GGUFMap, MoeshardError, _core


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_source().write(tmp_path / "model.gguf")


# Disks


def can_mount() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-rm", "true"]).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk the way Linux does")
def test_full_disk(tinymoe: Path, model: Path, tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("may not mount a file system here; test_file_size_limit is the substitute")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"'
    script = """
large, small, disk = sys.argv[1:]
attempt(moeshard.split, large, "0-63", disk + "/large.gguf")
print(os.listdir(disk))
attempt(moeshard.split, small, "0-3", disk + "/small.gguf")
attempt(moeshard.split, large, ["0-63", "64-127"], disk)
attempt(moeshard.split, large, "0-63", disk + "/small.gguf", force=True)
attempt(moeshard.verify, disk + "/small.gguf", small)
print(os.listdir(disk))
"""
    lines = run(script, tinymoe, model, disk, within=("unshare", "-rm", "sh", "-c", mount, "sh", str(disk)))
    full = (
        f"refused: {disk}/large.gguf: cannot write: No space left on device; free space on that disk or choose another"
    )
    assert lines[0].startswith(full)
    assert lines[1:3] == ["[]", "done"]
    assert all("No space left on device" in line for line in lines[3:5])
    assert lines[5:] == ["done", "['small.gguf']"]


def test_file_size_limit(tinymoe: Path, tmp_path: Path) -> None:
    script = """
model, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
attempt(moeshard.split, model, "0-63", out)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(os.listdir(os.path.dirname(out)))
attempt(moeshard.split, model, "0-63", out)
"""
    out = tmp_path / "out.gguf"
    lines = run(script, tinymoe, out)
    assert lines[0].startswith(f"refused: {out}: cannot write") and lines[0].endswith("File too large")
    assert lines[1:] == ["[]", "done"]


def test_read_only_folder(model: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path is not for other users
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copy(model, folder / "model.gguf")
        (folder / "model.gguf").chmod(0o444)
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0o555)
        script = """
model, folder, elsewhere = sys.argv[1:]
attempt(moeshard.split, model, ["0-3", "4-7"], elsewhere)  # imports everything while it can be read
if os.geteuid() == 0:  # who may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
attempt(moeshard.split, model, "0-3", folder + "/out.gguf")
attempt(moeshard.split, model, ["0-3", "4-7"], folder)
attempt(moeshard.split, model, ["0-3", "4-7"], folder + "/new")
"""
        lines = run(script, folder / "model.gguf", folder / "closed", folder / "elsewhere")
        assert lines.pop(0) == "done"
        assert "out.gguf: cannot write: Permission denied" in lines[0]
        assert "model.group-0.gguf: cannot write: Permission denied" in lines[1]
        assert "new': Permission denied" in lines[2]
        assert list((folder / "closed").iterdir()) == []


# The source


def test_source_truncated_before_writing(model: Path, tmp_path: Path) -> None:
    script = """
path, good, out = sys.argv[1:]
file = GGUFMap(path)
(segments,) = _core.shard_segments(file, moeshard.parse_keep("0-3", 2, 8))
_core.write_segments([segments], [good])
os.truncate(path, os.path.getsize(path) // 3)
attempt(_core.write_segments, [segments], [out])
attempt(segments.read, 0, segments.size)
attempt(_core.first_difference, segments, good)
attempt(_core.Model, path, segments)
attempt(moeshard.Model, path, keep="0-3")
"""
    lines = run(script, model, tmp_path / "good.gguf", tmp_path / "out.gguf")
    assert len(lines) == 5 and all(line.startswith("refused: ") for line in lines)
    assert f"{model}: was changed while it was being read" in lines[0]
    assert all(f"{model}: became shorter while it was read" in line for line in lines[1:3])
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "good.gguf"}


TRUNCATE = """
path, out = sys.argv[1:]
file = GGUFMap(path)
(segments,) = _core.shard_segments(file, moeshard.parse_keep("0-31", 1, 64))

def truncate(done, total):
    os.truncate(path, 1 << 20)

attempt(_core.write_segments, [segments], [out], progress=truncate, jobs=1)
print(os.listdir(os.path.dirname(out)))
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_source_truncated_while_writing(elsewhere: bool, tmp_path: Path) -> None:
    """At a point that differs from run to run; from another disk the kernel does not copy by itself."""
    folder = Path("/dev/shm") if elsewhere else tmp_path
    if not folder.exists() or (elsewhere and folder.stat().st_dev == tmp_path.stat().st_dev):
        pytest.skip("there is no second file system")
    (tmp_path / "out").mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = sizeable_model(Path(name) / "model.gguf", 64 << 20)
        first, listing = run(TRUNCATE, path, tmp_path / "out" / "out.gguf")
    assert first.startswith(f"refused: {path}: ") and ("became shorter" in first or "was changed" in first)
    assert listing == "[]"


def test_source_truncated_while_it_is_loaded(tinymoe: Path, tmp_path: Path) -> None:
    shutil.copy(tinymoe, tmp_path / "model.gguf")
    script = """
path = sys.argv[1]
fractions = []

def truncate(fraction):
    fractions.append(fraction)
    if len(fractions) == 2:
        os.truncate(path, 1 << 20)
    return True

attempt(moeshard.Model, path, keep="0-63", progress=truncate)
"""
    (line,) = run(script, tmp_path / "model.gguf")
    assert line.startswith(f"refused: {tmp_path}/model.gguf: ")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


@pytest.mark.parametrize("change", [append, overwrite, lambda path: os.utime(path, ns=(1, 1))])
def test_source_changed(change: Callable[[Path], None], model: Path, tmp_path: Path) -> None:
    file = GGUFMap(model)
    (segments,) = _core.shard_segments(file, moeshard.parse_keep("0-3", 2, 8))
    out = tmp_path / "out.gguf"
    once = [lambda: change(model)]

    def later(done: int, total: int) -> None:
        while once:
            once.pop()()

    with pytest.raises(MoeshardError, match="model.gguf: was changed while it was being read"):
        _core.write_segments([segments], [out], progress=later)
    with refused(tmp_path, "model.gguf: was changed while it was being read"):
        _core.write_segments([segments], [out])
    assert list(tmp_path.iterdir()) == [model]


def test_source_replaced_by_another_file(model: Path, tmp_path: Path) -> None:
    """What was opened is what is read."""
    shutil.copy(model, tmp_path / "twin.gguf")
    file = GGUFMap(model)
    small_source(seed=5).write(tmp_path / "new.gguf").rename(model)
    moeshard.split(file, "0-3", tmp_path / "out.gguf")
    moeshard.split(tmp_path / "twin.gguf", "0-3", tmp_path / "good.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "good.gguf").read_bytes()


# The process


@contextmanager
def writing(model: Path, out: Path, within: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process that stays in the middle of writing a file until a line is sent."""
    script = """
def wait(done, total):
    if not seen:
        seen.append(done)
        print("writing", flush=True)
        sys.stdin.readline()

seen = []
attempt(moeshard.split, sys.argv[1], "0-3", sys.argv[2], progress=wait)
"""
    command = [*within, sys.executable, "-c", PRELUDE + script, str(model), str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# Without /proc a file that has no name cannot be given one: such a process writes under a hidden name, as all do where
# the file system knows no files without names.
WITHOUT_PROC = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")


@pytest.fixture(params=["as here", "hidden name"])
def within(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param == "as here":
        return ()
    if sys.platform != "linux" or not can_mount():
        pytest.skip("may not hide /proc here")
    return WITHOUT_PROC


def hidden(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


def test_kill_in_the_middle(within: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with writing(model, out, within) as process:
        assert not out.exists()
        leftovers = hidden(tmp_path)
        assert len(leftovers) == (1 if within else len(leftovers))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert hidden(tmp_path) == leftovers
    others = [".out.gguf.abcdef.part", ".moeshard-zzzzzzzz-abcdefgh.part", ".moeshard.part"]
    others += [f"{leftover.name}x" for leftover in leftovers]
    for other in others:
        (tmp_path / other).write_bytes(b"mine")
    moeshard.split(model, "4-7", tmp_path / "another.gguf")  # whichever file it writes
    assert hidden(tmp_path) == sorted(tmp_path / other for other in others)
    moeshard.split(model, "4-7", out)
    moeshard.verify(out, model)


def test_two_processes_write_one_file(within: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    """The second does not take the first's file from it, and the first does not replace the second's."""
    out = tmp_path / "out.gguf"
    with writing(model, out, within) as process:
        of_first = hidden(tmp_path)
        moeshard.split(model, "4-7", out)
        assert hidden(tmp_path) == of_first
        data = out.read_bytes()
        said, _ = process.communicate("go on\n")
    assert "out.gguf: appeared while it was being written; it was left alone" in said
    assert out.read_bytes() == data
    assert hidden(tmp_path) == []


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop, MoeshardError, SystemExit])
def test_what_the_callback_raises_is_raised(kind: type[BaseException], model: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise kind("enough")

    before = sorted(tmp_path.iterdir())
    for keeps, out in ((["0-3", "4-7"], tmp_path), ("0-3", tmp_path / "out.gguf")):
        with pytest.raises(kind, match="enough"):
            moeshard.split(model, keeps, out, progress=stop)
        assert sorted(tmp_path.iterdir()) == before
    moeshard.split(model, ["0-3", "4-7"], tmp_path)


def test_interrupt_without_a_callback(tmp_path: Path) -> None:
    """Python's own handler runs in the thread that writes."""
    (tmp_path / "out").mkdir()
    path = sizeable_model(tmp_path / "model.gguf", 64 << 20)
    script = """
import signal
path, folder = sys.argv[1:]
seen = []
def once(number, frame):  # a second one would end the except block below
    seen.append(number)
    if len(seen) == 1:
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, once)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
try:
    for i in range(100):
        moeshard.split(path, "0-31", f"{folder}/out.gguf", force=True)
except KeyboardInterrupt:
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("interrupted", os.listdir(folder) in ([], ["out.gguf"]))
"""
    assert run(script, path, tmp_path / "out") == ["interrupted True"]
