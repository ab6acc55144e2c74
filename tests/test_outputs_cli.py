"""Where commands write: never over what they read, never over what is no file, and nothing found is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli, Result

import moeshard
from moeshard import GGUFMap, read_curve, read_evaluation, read_plan
from moeshard.profile.measure import analyze
from moeshard.report.sources import read_sources
from moeshard.report.writing import folder_of, write_report

PROGRAM = [sys.executable, "-c", "from moeshard.cli import main; main()"]
TEXT = moeshard.embedded_text("en")[:3000]
QUICK = ("--windows", 4, "--window", 64, "--prompt", 16, "--threads", 1)


@dataclass
class Files:
    """One of everything that commands read."""

    folder: Path
    model: Path
    text: Path
    profile: Path
    plan: Path
    ranking: Path
    keep: Path
    shards: Path

    def command(self, name: str, out: Path | str) -> list[str | Path | int]:
        """The command, writing to `out`."""
        text = ["--text", f"en={self.text}"]
        commands: dict[str, list[Any]] = {
            "analyze": [self.model, *text, "--window", 64, "-n", 64, "--threads", 1, "-o", out],
            "ranking": [
                *(self.model, *text, "--window", 64, "-n", 64, "--threads", 1),
                *("-o", self.folder / "other.npz", "--export-ranking", out),
            ],
            "plan": [self.model, "--profile", self.profile, "--groups", 2, "--keep", 64, "-o", out],
            "evaluate": [self.model, "--plan", self.plan, *text, *QUICK, "--generate", 0, "-o", out],
            "evaluate shards": [
                *(self.model, "--plan", self.plan, *text, *QUICK, "--generate", 0),
                *("--shards", self.shards, "-o", out),
            ],
            "curve": [self.model, "--profile", self.profile, *text, *QUICK, "--keep", "64", "-o", out],
            "csv": [self.model, "--profile", self.profile, *text, *QUICK, "--keep", "64", "--csv", out],
            "png": [self.model, "--profile", self.profile, *text, *QUICK, "--keep", "64", "--png", out],
            "report": [self.profile, self.plan, "-o", out],
            "split": [self.model, "--keep", self.keep, "-o", out],
            "merge": [*sorted(self.shards.glob("*.gguf")), "-o", out],
        }
        word = {"ranking": "analyze", "csv": "curve", "png": "curve"}.get(name, name.split()[0])
        return [word, *commands[name]]

    def read_by(self, name: str) -> list[Path]:
        """What this command reads."""
        shards = sorted(self.shards.glob("*.gguf"))
        return {
            "analyze": [self.model, self.text],
            "ranking": [self.model, self.text],
            "plan": [self.model, self.profile],
            "evaluate": [self.model, self.text, self.plan],
            "evaluate shards": [self.model, self.text, self.plan, *shards],
            "curve": [self.model, self.text, self.profile],
            "csv": [self.model, self.text, self.profile],
            "png": [self.model, self.text, self.profile],
            "report": [self.profile, self.plan],
            "split": [self.model, self.keep],
            "merge": shards,
        }[name]


COMMANDS = [
    "analyze",
    "ranking",
    "plan",
    "evaluate",
    "evaluate shards",
    "curve",
    "csv",
    "png",
    "report",
    "split",
    "merge",
]
STREAMS = ["plan", "evaluate", "curve", "csv", "report"]


@pytest.fixture(scope="module")
def made(tinymoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(tinymoe, folder / "model.gguf")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    model = moeshard.Model(tinymoe, n_threads=1)
    domain = moeshard.Domain("en", (TEXT,))
    analyze(model, [domain], window=64, n_tokens=256).save(folder / "profile.npz")
    plan = moeshard.make_plan(tinymoe, moeshard.read_profile(folder / "profile.npz"), n_keep=[64, 64], strategy="snake")
    plan.write(folder / "plan.json")
    moeshard.write_ranking(folder / "ranking.csv", np.ones((5, 128)), range(5))
    (folder / "keep.txt").write_text("0-63\n" * 5)
    moeshard.split(folder / "model.gguf", plan, folder / "shards")
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Files:
    folder = tmp_path / "in"
    shutil.copytree(made, folder)
    names = ("model.gguf", "text.txt", "profile.npz", "plan.json", "ranking.csv", "keep.txt", "shards")
    return Files(folder, *(folder / name for name in names))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_writes_over_what_it_reads(name: str, cli: Cli, files: Files, tmp_path: Path) -> None:
    before = contents(files.folder)
    for read in files.read_by(name):
        hard, soft = tmp_path / "hard", tmp_path / "soft"
        hard.hardlink_to(read)
        soft.symlink_to(read)
        for out in (hard, soft) if name == "png" else (read, hard, soft):  # a picture's ending says what it is
            done = cli(*files.command(name, out), "--force")  # type: ignore[arg-type]
            assert (done.code, done.out) == (1, ""), f"{name} -o {out}"
            assert "is the file that is read" in done.err and str(out) in done.err
        hard.unlink()
        soft.unlink()
    assert contents(files.folder) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_file_is_told_before_the_work(name: str, cli: Cli, files: Files, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for thing, said in (("pipe", "is a pipe, not a file"), ("socket", "is a socket"), ("nowhere", "does not exist")):
        before = (tmp_path / thing).lstat()
        done = cli(*files.command(name, tmp_path / thing), "--force")  # type: ignore[arg-type]
        assert done.code == 1 and said in done.err, done.err
        assert os.path.samestat(before, (tmp_path / thing).lstat())
    done = cli(*files.command(name, tmp_path / "missing" / "out"))  # type: ignore[arg-type]
    assert done.code == 1 and "No such file or directory" in done.err
    done = cli(*files.command(name, tmp_path / ("n" * 300)))  # type: ignore[arg-type]
    assert done.code == 1 and "too long" in done.err
    assert not (files.folder / "other.npz").exists()


def test_a_part_of_the_model_is_read_too(cli: Cli, files: Files, tmp_path: Path) -> None:
    (shard,) = moeshard.split(files.model, "all", tmp_path / "m.gguf", max_file_size=4 << 20)
    before = contents(tmp_path)
    assert len(shard.paths) > 1
    command = ["plan", shard.paths[0], "--profile", files.profile, "--groups", 2, "--keep", 64]
    done = cli(*command, "-o", shard.paths[1], "--force")  # type: ignore[arg-type]
    assert done.code == 1 and "is the file that is read" in done.err
    assert contents(tmp_path) == before


def test_split_reads_plans_and_rankings(cli: Cli, files: Files) -> None:
    before = contents(files.folder)
    for option, read in (("--plan", files.plan), ("--ranking", files.ranking)):
        groups = ["--groups", 2, "--mode", "snake"] if option == "--ranking" else []
        target = files.shards / "model.group-0.gguf" if groups else files.shards / "model.node-0.gguf"
        target.unlink(missing_ok=True)
        target.hardlink_to(read)
        done = cli("split", files.model, option, read, *groups, "-o", files.shards, "--force")  # type: ignore[arg-type]
        assert done.code == 1 and "is the file that is read" in done.err
        target.unlink()
    kept = {path: data for path, data in before.items() if ".gguf" not in path}
    assert {path: data for path, data in contents(files.folder).items() if ".gguf" not in path} == kept


def test_two_results_in_one_file(cli: Cli, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli(*files.command("curve", out), "--csv", out)  # type: ignore[arg-type]
    assert done.code == 1 and "would be written twice" in done.err
    done = cli(*files.command("analyze", out), "--export-ranking", out)  # type: ignore[arg-type]
    assert done.code == 1 and "would be written twice" in done.err
    (tmp_path / "out.partial").hardlink_to(files.text)
    done = cli(*files.command("analyze", out), "--force")  # type: ignore[arg-type]
    assert done.code == 1 and "out.partial: is the file that is read" in done.err


# stdout


@pytest.mark.parametrize("name", STREAMS)
def test_a_dash_is_stdout(name: str, cli: Cli, files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    streamed = cli(*files.command(name, "-"))
    assert streamed.code == 0, streamed.err
    assert contents(tmp_path) == before
    assert cli(*files.command(name, tmp_path / "out")).code == 0
    written = (tmp_path / "out").read_text(encoding="utf-8")
    if name == "report":
        assert streamed.out.startswith("<!DOCTYPE html>") and streamed.out.endswith("</html>\n")
        assert "_files/" not in streamed.out
    elif name == "csv":
        assert streamed.out == written
    else:
        assert undated(streamed.out) == undated(written)


def undated(text: str) -> Any:
    """Return a document without what says when and by which command it was made."""
    document = json.loads(text)
    for place in (document, *document.values()):
        if isinstance(place, dict):
            place.pop("made", None)
    return document


def test_what_is_no_stream(cli: Cli, files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("analyze", "ranking", "split", "merge"):
        done = cli(*files.command(name, "-"))
        assert done.code == 2 and "cannot go to stdout" in done.err
    for name in ("plan", "evaluate", "curve"):
        done = cli(*files.command(name, "-"), "--json")
        assert done.code == 2 and "only one result can go to stdout" in done.err
    done = cli(*files.command("curve", "-"), "--csv", "-")
    assert done.code == 2 and "only one result can go to stdout" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_picture_goes_to_a_pipe_and_to_no_terminal(cli: Cli, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*PROGRAM, *map(str, files.command("png", "-"))]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.startswith(b"\x89PNG")
    main, terminal = os.openpty()
    with subprocess.Popen(command, stdout=terminal, stderr=subprocess.PIPE) as process:
        assert process.wait() == 2
        assert process.stderr is not None and b"terminal" in process.stderr.read()
    os.close(terminal)
    os.close(main)


# Nothing is lost


@pytest.mark.parametrize("name", ["evaluate", "curve", "plan"])
def test_results_outlive_a_file_that_appears(
    name: str, cli: Cli, files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "results" / "out.json"
    out.parent.mkdir()
    home = {"evaluate": "moeshard.evaluate", "curve": "moeshard.evaluation.curve.measure_curve"}
    place = home.get(name, "moeshard.planning.planner.make_plan")
    module, _, function = place.rpartition(".")
    original: Callable[..., Any] = getattr(sys.modules.get(module) or __import__(module, fromlist=["x"]), function)

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        out.write_bytes(b"mine")
        return found

    monkeypatch.setattr(place, meanwhile)
    done = cli(*files.command(name, out))
    assert done.code == 1 and "out.json: exists already" in done.err and "Traceback" not in done.err
    assert out.read_bytes() == b"mine"
    (rescued,) = (path for path in out.parent.iterdir() if path != out)
    assert str(rescued) in done.err
    {"evaluate": read_evaluation, "curve": read_curve, "plan": read_plan}[name](rescued)  # type: ignore[operator]
    assert "group" in done.out or "ranked" in done.out or "node-0" in done.out  # the table


def test_results_outlive_their_folder(cli: Cli, files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out.json"
    out.parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    original = moeshard.evaluate

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        out.parent.rmdir()
        return original(*arguments, **options)

    monkeypatch.setattr("moeshard.evaluate", meanwhile)
    done = cli(*files.command("evaluate", out), "--json")
    assert done.code == 1 and json.loads(done.out)["moeshard_evaluation"]
    (rescued,) = (tmp_path / "elsewhere").iterdir()
    assert str(rescued) in done.err and read_evaluation(rescued).domains == ["en"]


# Reports


def test_a_report_that_is_interrupted_leaves_nothing(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources, page = read_sources([files.profile, files.plan]), tmp_path / "r.html"
    from moeshard.report import writing

    original = writing.render
    left = [3]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(writing, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(sources, page)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    folder_of(page).mkdir()  # an empty folder, as a killed process may leave, is in nobody's way
    (folder_of(page) / "mine.txt").write_text("mine")
    write_report(sources, page)
    assert (folder_of(page) / "heatmap.png").exists()


def test_a_report_is_whole_or_not_there(files: Files, tmp_path: Path) -> None:
    sources, page = read_sources([files.profile, files.plan]), tmp_path / "r.html"
    page.mkdir()
    with pytest.raises(moeshard.MoeshardError, match="is a directory"):
        write_report(sources, page, force=True)
    page.rmdir()
    folder_of(page).write_text("mine")
    with pytest.raises(moeshard.MoeshardError, match="r_files: is not a folder"):
        write_report(sources, page, force=True)
    folder_of(page).unlink()
    folder_of(page).mkdir()
    (folder_of(page) / "heatmap.csv").symlink_to(files.profile)
    with pytest.raises(moeshard.MoeshardError, match="is the file that is read"):
        write_report(sources, page, force=True)
    assert not page.exists() and [path.name for path in folder_of(page).iterdir()] == ["heatmap.csv"]


# Signals


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a while to copy: experts of 64 MiB."""
    sys.path.insert(0, str(Path(__file__).parent / "split"))
    from fault_scripts import sizeable_model

    return sizeable_model(tmp_path_factory.mktemp("large") / "model.gguf", 64 << 20)


@pytest.fixture
def splitting(large: Path, tmp_path: Path) -> Callable[[int], Result]:
    """Send a signal to a process in the middle of a split."""
    out = tmp_path / "out"
    script = """
import sys, time
import moeshard._core as core
write = core.write_segments

def slowly(*arguments, progress, **options):  # the machine may be faster than the test
    def step(done, total):
        if not said:
            said.append(print("writing", flush=True))
        time.sleep(0.2)
        progress(done, total)
    said = []
    return write(*arguments, progress=step, **options)

core.write_segments = slowly
from moeshard.cli import main
main()
"""

    def send(number: int) -> Result:
        command = [sys.executable, "-c", script, "split", str(large), "-o", str(out), "--groups", "2", "--jobs", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            process.send_signal(number)
            said, told = process.communicate(timeout=60)
            return Result(process.returncode, said, told)

    return send


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_nothing(number: int, splitting: Callable[[int], Result], tmp_path: Path) -> None:
    done = splitting(number)
    assert done.code == 128 + number
    assert "Traceback" not in done.err
    assert list(tmp_path.rglob("*")) == []


def test_signals_that_are_ignored_stay_so() -> None:
    script = """
import os, signal
from moeshard.cli.process import orderly_exit
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with orderly_exit():
    os.kill(os.getpid(), signal.SIGHUP)
    print("still here", flush=True)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # timeout(1) sends it to the group too
        print("cleaned up", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "still here\ncleaned up\n")


def test_ctrl_c_at_the_end_leaves_the_plan_with_the_shards(files: Files, tmp_path: Path) -> None:
    """All of them are there or none: the plan is one of the files that are published together."""
    out = tmp_path / "out"
    script = """
import os, signal, sys
from moeshard.cli import main
import moeshard._core as core
write = core.write_segments

def late(*arguments, progress, **options):
    def step(done, total):
        progress(done, total)
        if done == total:
            signal.setitimer(signal.ITIMER_REAL, int(os.environ["DELAY"]) / 1e6)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    return write(*arguments, progress=step, **options)

core.write_segments = late
main()
"""
    seen = set()
    for delay in ("1", "2000", "20000"):
        command = [sys.executable, "-c", script, "split", str(files.model), "-o", str(out), "--plan", str(files.plan)]
        done = subprocess.run([*command, "--force"], capture_output=True, env={**os.environ, "DELAY": delay})
        names = sorted(path.name for path in out.iterdir()) if out.exists() else []
        assert names in ([], ["model.node-0.gguf", "model.node-1.gguf", "plan.json"]), delay
        assert done.returncode in (0, 130), done.stderr
        seen.add(done.returncode)
        shutil.rmtree(out, ignore_errors=True)
    assert seen


def test_the_plan_is_written_with_the_shards(files: Files, tmp_path: Path) -> None:
    plan = read_plan(files.plan)
    moeshard.split(files.model, plan, tmp_path / "out", write_plan=True)
    assert read_plan(tmp_path / "out" / "plan.json").to_json() == plan.to_json()
    moeshard.split(GGUFMap(files.model), plan, tmp_path / "none")
    assert not (tmp_path / "none" / "plan.json").exists()
    os.mkfifo(tmp_path / "none" / "plan.json")
    with pytest.raises(moeshard.MoeshardError, match="plan.json: is a pipe"):
        moeshard.split(files.model, plan, tmp_path / "none", write_plan=True, force=True)
