"""What reaches a terminal, a pipe, a closed or a full stream, and how errors are said."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli
from model_copy import copy_with

import moeshard
from moeshard import MoeshardError
from moeshard.cli.terminal import command, printable

PROGRAM = [sys.executable, "-c", "from moeshard.cli import main; main()"]
ESCAPE = "model\x1b]0;a title\x07\x1b[2J\x9b31m\u202egnol\nexperts none"
GENERATE = ("generate", "tinymoe", "-p", "a", "-n", "2", "--threads", "1")


def shell(script: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``"$@"``, which is the program with these arguments, within a shell script."""
    words = ["sh", "-c", script, "sh", *PROGRAM, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **options)


def on_terminal(width: int, *arguments: str | Path) -> str:
    """Return what a terminal so wide shows, stdout alone."""
    main, other = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm"}
    with subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], stdout=other, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(other)
        pieces = []
        while True:
            try:
                piece = os.read(main, 1 << 16)
            except OSError:  # how Linux says that nobody writes any more
                break
            if not piece:
                break
            pieces.append(piece)
        process.wait(timeout=120)
    os.close(main)
    return b"".join(pieces).decode().replace("\r\n", "\n")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def named(tinymoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is called after what terminals act on."""
    return copy_with(tinymoe, tmp_path_factory.mktemp("named") / "m.gguf", {"general.name": ESCAPE})


@pytest.fixture(scope="module")
def profile(tinymoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "p.npz"
    domains = [moeshard.Domain("a-domain-of-a-long-name[bold]", (moeshard.embedded_text("en", "calibration")[:9000],))]
    moeshard.analyze(moeshard.Model(tinymoe, n_threads=1), domains).save(path)
    return path


class TestNames:
    def test_printable(self) -> None:
        assert printable("a\x1b[31m\x07\x9b\x7f\u202e\n\té") == "a\\x1b[31m\\x07\\x9b\\x7f\\u202e\\n\\té"
        assert printable("a\n\t\r", lines=True) == "a\n\t\\r"
        assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
        assert printable("naïve 文字 🙂") == "naïve 文字 🙂"

    def test_a_models_name_cannot_write_to_the_terminal(self, named: Path) -> None:
        for shown in (on_terminal(80, "inspect", named), shell('"$@"', "inspect", named).stdout):
            bare = re.sub("\x1b\\[[0-9;]*m", "", shown)
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", bare)
            (line,) = [line for line in bare.splitlines() if line.startswith("model ")]
            assert "model\\x1b]0;a title\\x07\\x1b[2J\\x9b31m\\u202egnol\\nexperts none" in line

    def test_json_holds_the_name_and_nothing_for_terminals(self, named: Path) -> None:
        done = shell('"$@"', "inspect", named, "--json")
        assert json.loads(done.stdout)["name"] == ESCAPE
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.stdout)

    def test_the_engines_log_neither(self, named: Path) -> None:
        done = shell('"$@"', "--log-level", "info", "generate", named, "-p", "a", "-n", "1", "--threads", "1")
        assert "general.name" in done.stderr and "\x1b" not in done.stderr and "\x9b" not in done.stderr

    def test_paths_are_no_markup(self, cli: Cli, tinymoe: Path, tmp_path: Path) -> None:
        folder = tmp_path / "d["
        folder.mkdir()
        (tmp_path / "[bold].gguf").symlink_to(tinymoe)
        with inside(tmp_path):
            done = cli("split", "[bold].gguf", "-o", "d[/red].gguf", "--keep", "0-31")
            assert done.code == 0 and "d[/red].gguf" in done.out
            done = cli("split", "[bold].gguf", "-o", ":smile:", "--groups", "2")
            assert done.code == 0 and ":smile:/[bold].group-1.gguf" in done.out
            assert ":smile:/[bold].group-1.gguf" in on_terminal(120, "split", "[bold].gguf", "-o", ":smile:", *FORCED)
            done = cli("verify", ":smile:/[bold].group-1.gguf", "--source", "[bold].gguf")
            assert done.code == 0 and done.out.startswith(":smile:/[bold].group-1.gguf: a shard of [bold].gguf")
            done = cli("inspect", "[red]no.gguf")
            assert done.code == 1 and "[red]no.gguf" in done.err

    def test_text_is_bare_in_a_pipe_and_printable_on_a_terminal(self) -> None:
        script = "from moeshard.cli.terminal import pour; pour('a\\x1b[31mb\\n')"
        assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"a\x1b[31mb\n"
        main, other = pty.openpty()
        subprocess.run([sys.executable, "-c", script], stdout=other, check=True)
        assert os.read(main, 100) == b"a\\x1b[31mb\r\n"
        os.close(main)
        os.close(other)

    def test_hints_can_be_pasted(self, cli: Cli, tmp_path: Path, profile: Path) -> None:
        plan = tmp_path / "my plan's.json"
        done = cli("plan", "tinymoe", "--profile", profile, "--groups", 2, "--keep", 64, "-o", plan)
        hint = done.err[done.err.index("moeshard split") :].rstrip("]\n")
        assert shlex.split(hint) == ["moeshard", "split", "tinymoe", "-o", "shards", "--plan", str(plan)]
        with inside(tmp_path):
            assert cli(*shlex.split(hint)[1:]).code == 0
        assert command("a", "b c", Path("d'e")) == "a 'b c' 'd'\"'\"'e'"


FORCED = ("--groups", "2", "--force")


class TestTables:
    def test_in_a_pipe_nothing_is_cut(self, tmp_path: Path, tinymoe: Path) -> None:
        folder = tmp_path / ("long-" * 30)
        done = shell('"$@"', "split", tinymoe, "-o", folder, "--groups", "2")
        (line,) = [line for line in done.stdout.splitlines() if "group-1" in line]
        assert str(folder / f"{tinymoe.stem}.group-1.gguf") in line and line.endswith("%") and "8.8 MiB" in line
        assert "…" not in done.stdout and not any(line.endswith(" ") for line in done.stdout.splitlines())

    @pytest.mark.parametrize("width", [20, 40, 80])
    def test_names_are_shortened_on_a_narrow_terminal_and_numbers_are_not(
        self, width: int, profile: Path, tmp_path: Path
    ) -> None:
        arguments = ("plan", "tinymoe", "--profile", profile, "--groups", "2", "--keep", "64", "--force", "-o")
        shown = re.sub("\x1b\\[[0-9;]*m", "", on_terminal(width, *arguments, tmp_path / "p.json"))
        plan = moeshard.read_plan(tmp_path / "p.json")
        rows = [line for line in shown.splitlines() if "64 of 128" in line]
        assert len(rows) == 2 and all(line.split()[-2] == "MiB" for line in rows)
        for node in plan.nodes:
            (share,) = node.facts["captured"].values()
            assert f"{share:.0%}" in [line.split()[-1] for line in rows]

    def test_folded_names_keep_their_numbers(self, tinymoe: Path) -> None:
        shown = re.sub("\x1b\\[[0-9;]*m", "", on_terminal(50, "inspect", tinymoe))
        assert len(re.findall(r"4\.0 MiB +6\.4 KiB$", shown, re.MULTILINE)) == 3
        assert "…" not in shown


class TestStreams:
    @pytest.mark.parametrize("arguments", [GENERATE, (*GENERATE, "--json"), ("inspect", "tinymoe"), ("--help",)])
    @pytest.mark.parametrize(("to", "reason"), [("/dev/full", "No space left"), ("&-", "Bad file descriptor")])
    def test_stdout_that_cannot_be_written(self, arguments: tuple[str, ...], to: str, reason: str) -> None:
        done = shell(f'"$@" >{to}', *arguments)
        assert done.returncode == 1
        assert f"cannot write to stdout: {reason}" in done.stderr.splitlines()[-1]
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize("to", ["/dev/full", "&-"])
    def test_stderr_that_cannot_be_written(self, to: str, tmp_path: Path, tinymoe: Path) -> None:
        done = shell(f'"$@" 2>{to}', *GENERATE)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\n")
        assert shell(f'"$@" 2>{to}', "inspect", "no.gguf").returncode == 1
        assert shell(f'"$@" 2>{to}', "inspect").returncode == 2
        assert shell(f'"$@" >{to} 2>{to}', *GENERATE).returncode == 1
        # No file takes the number of a closed stream, which the engine writes to.
        done = shell(f'"$@" 2>{to}', "split", tinymoe, "--keep", "0-63", "-o", tmp_path / "s.gguf")
        assert done.returncode == 0 and moeshard.verify(tmp_path / "s.gguf", tinymoe).bytes > 0

    def test_stdin_that_is_closed(self) -> None:
        assert shell('"$@" <&-', *GENERATE).returncode == 0

    def test_a_reader_that_left(self) -> None:
        done = shell('{ "$@"; echo $? >&2; } | true', "--help")
        assert done.stderr in ("141\n", "0\n")  # 0: all was written before it left


class TestVoice:
    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (("inspect", "no.gguf"), 1, "no.gguf"),
            (("inspect",), 2, "MODEL"),
            (("inspect", "tinymoe", "--nonsense"), 2, "--nonsense"),
            (("nonsense",), 2, "nonsense"),
            (("report", "."), 1, "."),
        ],
    )
    def test_one_form_for_all_errors(self, cli: Cli, arguments: tuple[str, ...], code: int, said: str) -> None:
        done = cli(*arguments)
        last = done.err.splitlines()[-1]
        assert done.code == code and last.startswith("error: ") and said in last and done.out == ""
        as_json = cli(*arguments, "--json") if arguments[0] != "report" else cli(*arguments, "-o", "--json")
        found = json.loads(as_json.err)
        assert as_json.code == found["exit_code"] == code and said in found["error"] and as_json.out == ""

    def test_warnings_are_json_too(self, cli: Cli, profile: Path, tmp_path: Path) -> None:
        arguments = ("plan", "tinymoe", "--profile", profile, "-o", tmp_path / "p.json", "--ctx", "256", "--nodes")
        done = cli(*arguments, "1GiB,2GiB", "--json")
        assert "no plan is needed" in json.loads(done.err)["warning"] and len(json.loads(done.out)["nodes"]) == 2
        assert "the whole model fits on node-1" in cli(*arguments, "12MiB,1GiB", "--force").err
        assert "whole model" not in cli(*arguments, "12MiB,13MiB", "--force").err

    def test_sizes_have_units(self, cli: Cli, profile: Path, tmp_path: Path) -> None:
        arguments = ("plan", "tinymoe", "--profile", profile, "-o", tmp_path / "p.json", "--ctx", "256", "--nodes")
        few = cli(*arguments, "4MiB")
        assert few.code == 1 and "4.0 MiB are too few" in few.err and "weights take 3.2 MiB" in few.err
        bare = cli(*arguments, "24")
        assert bare.code == 2 and "'24' is 24 bytes; did you mean 24GiB?" in bare.err

    @pytest.mark.parametrize(
        "arguments",
        [
            ("place", "--plan", "x", "-p", "a", "--probe", "best"),
            ("evaluate", "tinymoe", "--plan", "x", "--probe", "best"),
            ("plan", "tinymoe", "--profile", "x", "-o", "y", "--groups", "2", "--keep", "8", "--strategy", "best"),
            ("curve", "tinymoe", "--profile", "x", "--strategies", "ranked,best"),
            ("split", "tinymoe", "-o", "x", "--groups", "2", "--mode", "best"),
            ("analyze", "tinymoe", "-o", "x", "--ranking", "best"),
            ("demo", "--domain", "best"),
            ("--log-level", "best", "inspect", "tinymoe"),
        ],
    )
    def test_wrong_choices_are_wrong_usage(self, cli: Cli, arguments: tuple[str, ...]) -> None:
        done = cli(*arguments)
        assert done.code == 2 and "'best' is unknown; choose from " in done.err

    def test_a_dense_model_is_called_dense(self, cli: Cli, tmp_path: Path) -> None:
        import gguf

        path = tmp_path / "dense.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32("llama.block_count", 1)
        writer.add_tensor("token_embd.weight", np.zeros((8, 8), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert "a dense model" in cli("inspect", path).out
        for arguments in (("--groups", 2), ("--keep", "0-3")):
            done = cli("split", path, "-o", tmp_path / "x", *arguments)
            assert done.code == 1 and "dense" in done.err and "part of a model" not in done.err, arguments

    def test_a_trunk_is_called_a_trunk(self, cli: Cli, tmp_path: Path) -> None:
        assert cli("split", "tinymoe", "-o", tmp_path, "--groups", "2", "--trunk-once").code == 0
        done = cli("split", tmp_path / "trunk.gguf", "-o", tmp_path / "x", "--groups", "2")
        assert done.code == 1 and "in other files" in done.err and "dense" not in done.err

    def test_pictures_follow_their_ending(self, cli: Cli, profile: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        text = tmp_path / "t.txt"
        text.write_text(moeshard.embedded_text("en", "heldout")[:9000], encoding="utf-8")
        base = ("curve", "tinymoe", "--profile", profile, "--text", text, "--keep", "64", "--threads", "1")
        base += ("--windows", "4", "--window", "64", "--prompt", "16", "--png")
        for name, begins in (("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.PNG", b"\x89PNG")):
            done = cli(*base, tmp_path / name)
            assert done.code == 0 and (tmp_path / name).read_bytes().startswith(begins), done.err
        wrong = cli(*base, tmp_path / "a.jpg")
        assert wrong.code == 2 and "a.jpg" in wrong.err and ".svg" in wrong.err


class TestOptionsOfGenerate:
    @pytest.fixture
    def model(self, tinymoe: Path) -> moeshard.Model:
        return moeshard.Model(tinymoe, n_threads=1)

    def test_a_progress_that_returns_nothing_goes_on(self, tinymoe: Path) -> None:
        seen: list[float] = []
        for progress in (seen.append, lambda fraction: 0.0, lambda fraction: True, lambda fraction: "no"):
            moeshard.Model(tinymoe, progress=progress)  # type: ignore[arg-type]
        assert seen and seen[-1] == 1.0
        with pytest.raises(MoeshardError):
            moeshard.Model(tinymoe, progress=lambda fraction: False)

    def test_one_text_to_stop_at_is_one(self, model: moeshard.Model) -> None:
        text = "".join(model.generate("The Debian", temperature=0, max_tokens=24))
        stop = text[4:8]
        assert "".join(model.generate("The Debian", temperature=0, max_tokens=24, stop=stop)) == text.split(stop)[0]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"seed": -1}, "seed must be a whole number from 0 to 4294967294; None for a random one, got -1"),
            ({"seed": 2**32 - 1}, "seed"),
            ({"seed": 1.5}, "seed"),
            ({"top_k": 2**31}, "top_k must be a whole number"),
            ({"max_tokens": 2**31}, "max_tokens"),
            ({"max_tokens": 2**31 - 1}, "too long"),
            ({"max_tokens": "3"}, "max_tokens"),
            ({"repeat_last_n": 2**40}, "repeat_last_n"),
            ({"temperature": float("nan")}, "temperature must be a finite number"),
            ({"temperature": -1}, "temperature"),
            ({"top_p": -0.5}, "top_p"),
            ({"top_p": float("nan")}, "top_p"),
            ({"min_p": float("inf")}, "min_p"),
            ({"repeat_penalty": float("inf")}, "repeat_penalty"),
            ({"stop": [3]}, "stop must be a text or several"),
        ],
    )
    def test_what_the_engine_cannot_take_is_named(
        self, model: moeshard.Model, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(MoeshardError, match=re.escape(said)):
            model.generate("a", **options)

    def test_numbers_of_numpy_are_numbers(self, model: moeshard.Model) -> None:
        first = model.generate("a", seed=np.int64(3), max_tokens=np.int32(4), temperature=np.float32(0.5))  # type: ignore[arg-type]
        assert "".join(first) == "".join(model.generate("a", seed=3, max_tokens=4, temperature=0.5))


class TestGlobalOptions:
    def test_the_engine_is_quiet_unless_asked(self) -> None:
        quiet = shell('"$@"', *GENERATE)
        assert quiet.stderr.count("\n") == 1 and quiet.stderr.startswith("[prompt")
        for asked in (("-v",), ("--log-level", "info")):
            assert "llama_model_loader" in shell('"$@"', *asked, *GENERATE).stderr
        assert "llama_model_loader" in shell('"$@"', *GENERATE, env={**os.environ, "MOESHARD_LOG": "info"}).stderr

    def test_warnings_of_the_engine_are_shown(self) -> None:
        done = shell('"$@"', *GENERATE, "--ctx", "1024")
        assert "training context" in done.stderr
        assert "training context" not in shell('"$@"', *GENERATE, "--ctx", "1024", "--json").stderr

    def test_an_error_of_the_engine_is_said_once(self, tinymoe: Path, tmp_path: Path) -> None:
        path = copy_with(tinymoe, tmp_path / "m.gguf", {"tokenizer.ggml.pre": "no-such-pre"})
        done = shell('"$@"', "generate", path, "-p", "a", "-n", "1", "--threads", "1")
        assert done.returncode == 1 and done.stderr.count("no-such-pre") == 1, done.stderr

    def test_names_complete_in_a_shell(self) -> None:
        def completed(words: str) -> list[str]:
            environment = {"_MOESHARD_COMPLETE": "complete_bash", "COMP_WORDS": words}
            environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
            return shell('"$@"', env={**os.environ, **environment}).stdout.split()

        assert completed("moeshard ev") == ["evaluate"]
        assert completed("moeshard place --probe s") == ["saliency"]
        assert completed("moeshard split --mode ") == ["contiguous", "balanced", "tiers", "snake"]
