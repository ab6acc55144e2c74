"""The command line as a user meets it: output, exit codes, and what it loads."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from command_line import Cli, Result

import moeshard
from moeshard.cli import output, terminal
from moeshard.gguf.inspection import inspect_model
from moeshard.sizes import size

PROGRAM = [sys.executable, "-c", "from moeshard.cli import main; main()"]


def generate(cli: Cli, *arguments: str | Path) -> Result:
    return cli("generate", "tinymoe", "--threads", "1", *arguments)


def write_model(path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Path:
    """Write a GGUF with float32 zeros; shapes outermost axis first."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"{arch}.{key}", value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """A deepseek2 with a dense layer, groups, a shared expert and per-expert values."""
    metadata = {
        "block_count": 3,
        "embedding_length": 32,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
    }
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, 32)}
    for layer in (1, 2):
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = (8, 32)
        tensors[f"blk.{layer}.exp_probs_b.bias"] = (8,)
        tensors[f"blk.{layer}.ffn_gate_exps.weight"] = (8, 16, 32)
        tensors[f"blk.{layer}.ffn_up_exps.weight"] = (8, 16, 32)
        tensors[f"blk.{layer}.ffn_down_exps.weight"] = (8, 32, 16)
    return write_model(tmp_path / "grouped.gguf", "deepseek2", metadata, tensors)


class TestWholeProgram:
    @pytest.mark.parametrize("arguments", [["--help"], ["inspect", "-h"], ["generate", "--help"], ["demo", "--help"]])
    def test_help(self, arguments: list[str]) -> None:
        done = subprocess.run([*PROGRAM, *arguments], check=True, capture_output=True, text=True)
        assert done.stdout.startswith("Usage: moeshard")
        assert not done.stderr

    def test_help_and_import_load_nothing_heavy(self) -> None:
        script = """if True:
            import sys, moeshard
            assert not {"numpy", "moeshard._core"} & set(sys.modules)
            from moeshard.cli.app import app
            try:
                app(["generate", "--help"])
            except SystemExit:
                pass
            print(sorted({"numpy", "rich", "moeshard._core"} & set(sys.modules)), file=sys.stderr)
        """
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        assert done.stderr.strip() == "[]"

    def test_help_names_every_command(self, cli: Cli) -> None:
        done = cli("--help")
        assert done.code == 0
        assert all(name in done.out for name in ("inspect", "generate", "demo", "--version"))
        assert "..." not in done.out.split("Commands:")[1]

    def test_model_argument_tells_of_the_embedded_model(self, cli: Cli) -> None:
        for command in ("inspect", "generate"):
            assert "'tinymoe'" in cli(command, "--help").out

    def test_version(self, cli: Cli) -> None:
        for option in ("--version", "-V"):
            done = cli(option)
            lines = done.out.splitlines()
            assert done.code == 0 and lines[0] == f"moeshard {moeshard.__version__}"
            pin = (Path(__file__).parents[1] / "third_party" / "llama.cpp" / "pin.txt").read_text()
            version = re.search(r"^llama-cpp-python==(\S+)", pin, re.MULTILINE)
            assert version is not None and lines[1].endswith(f"llama-cpp-python {version[1]}")
            assert "CPU" in lines[2] and lines[-1].startswith("built for")

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["nonsense"],
            ["inspect"],
            ["inspect", "tinymoe", "--nonsense"],
            ["generate", "tinymoe"],
            ["generate", "tinymoe", "-p", "a", "-f", "b"],
            ["generate", "tinymoe", "-f", "no/such/file"],
            ["generate", "tinymoe", "-p", "a", "--system", "b"],
            ["generate", "tinymoe", "-p", "a", "--top-p", "2"],
            ["demo", "--windows", "0"],
        ],
    )
    def test_wrong_usage_is_2(self, cli: Cli, arguments: list[str]) -> None:
        done = cli(*arguments)
        assert done.code == 2
        assert "Usage: moeshard" in done.out + done.err
        assert "Traceback" not in done.err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["inspect", "no/such.gguf"], "no/such.gguf"),
            (["inspect", __file__], "test_cli.py"),
            (["generate", "no/such.gguf", "-p", "a"], "no/such.gguf"),
            (["generate", "tinymoe", "-p", "a", "--keep", "0-200"], "'0-200' is out of range"),
            (["generate", "tinymoe", "-p", "a", "--keep", "0-3"], "layer 0 keeps 4 experts"),
            (["generate", "tinymoe", "-p", "a", "--chat"], "chat template"),
        ],
    )
    def test_errors_are_1_and_one_paragraph(self, cli: Cli, arguments: list[str], said: str) -> None:
        done = cli(*arguments)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: ")
        assert said in done.err
        assert done.err.count("\n") == 1

    def test_other_exceptions_are_not_hidden(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(path: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr("moeshard.gguf.inspection.inspect_model", broken)
        with pytest.raises(ZeroDivisionError):
            cli("inspect", "tinymoe")

    def test_interrupted_is_130(self) -> None:
        command = [*PROGRAM, "generate", "tinymoe", "-p", "a", "-n", "-1", "--ctx", "1000000", "--threads", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(1)  # it is generating
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            assert process.wait(timeout=60) == 130
            assert time.monotonic() - started < 30
            assert b"Traceback" not in process.stderr.read()

    def test_a_reader_that_leaves_ends_it_quietly(self) -> None:
        command = [*PROGRAM, "--log-level", "none"]
        command += ["generate", "tinymoe", "-p", "a", "-n", "-1", "--ctx", "1000000", "--threads", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(1)
            process.stdout.close()
            assert process.wait(timeout=60) == 141
            assert process.stderr.read() == b""


class TestInspect:
    def test_tables(self, cli: Cli) -> None:
        done = cli("inspect", "tinymoe")
        assert done.code == 0
        lines = done.out.splitlines()
        assert "experts         128 per layer, 8 per token" in lines
        assert "routing         softmax, weights renormalised" in lines
        assert max(map(len, lines[1:])) <= 80
        assert "\x1b" not in done.out
        row = next(line.split() for line in lines if line.startswith("ffn_up_exps.weight"))
        assert row[:3] == ["ffn_up_exps.weight", "0-4", "slab"]

    def test_json_is_what_the_layout_says(self, cli: Cli) -> None:
        found = json.loads(cli("inspect", "tinymoe", "--json").out)
        layout = moeshard.GGUFMap(moeshard.embedded_model()).moe_layout()
        for key in ("arch", "n_layer", "n_expert", "n_expert_used", "moe_layers", "trunk_bytes", "expert_bytes"):
            assert found[key] == getattr(layout, key), key
        assert sum(found["type_bytes"].values()) == found["trunk_bytes"] + found["expert_bytes"]
        assert len(found["expert_tensors"]) == len(layout.tensors)
        for tensor in found["expert_tensors"]:
            assert tensor["bytes"] == tensor["bytes_per_expert"] * tensor["shape"][tensor["expert_axis"]]

    def test_one_expert_written_without_its_axis(self, tmp_path: Path) -> None:
        tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, 32), "blk.0.ffn_gate_inp.weight": (1, 32)}
        tensors |= {f"blk.0.ffn_{name}_exps.weight": (16, 32) for name in ("gate", "up")}
        tensors["blk.0.ffn_down_exps.weight"] = (32, 16)
        metadata = {"block_count": 1, "embedding_length": 32, "expert_count": 1, "expert_used_count": 1}
        found = inspect_model(write_model(tmp_path / "one.gguf", "qwen3moe", metadata, tensors))
        slabs = {tensor.name: tensor for tensor in found.expert_tensors if tensor.role == "slab"}
        assert len(slabs) == 3
        assert all(tensor.expert_axis == 0 and tensor.shape[0] == 1 for tensor in slabs.values())
        assert slabs["blk.0.ffn_down_exps.weight"].shape == (1, 32, 16)

    def test_groups_shared_experts_and_dense_layers(self, cli: Cli, grouped: Path) -> None:
        done = cli("inspect", grouped)
        assert done.code == 0, done.err
        assert "MoE layers      2: 1-2\n" in done.out
        assert "8 per layer, 2 per token, and 1 shared (in the trunk)\n" in done.out
        assert "sigmoid, weights renormalised, from the best 2 of 4 groups\n" in done.out
        found = inspect_model(grouped)
        expert = 3 * 16 * 32 * 4
        assert found.per_expert_bytes == (0, expert, expert)
        assert found.active_bytes == found.trunk_bytes + 2 * 2 * expert
        assert found.name is None

    def test_dense_model(self, cli: Cli, tmp_path: Path) -> None:
        path = write_model(
            tmp_path / "dense.gguf",
            "llama",
            {"block_count": 2, "embedding_length": 32},
            {"token_embd.weight": (100, 32), "blk.0.ffn_up.weight": (64, 32)},
        )
        done = cli("inspect", path)
        assert done.code == 0, done.err
        assert "none: a dense model" in done.out
        assert json.loads(cli("inspect", path, "--json").out)["expert_tensors"] == []


class TestGenerate:
    def test_text_on_stdout_statistics_on_stderr(self, cli: Cli) -> None:
        first = generate(cli, "-p", "The Debian", "-n", "8", "--seed", "7", "--keep", "0-63")
        assert first.code == 0
        assert first.out.endswith("\n")
        assert "answer 8 tokens" in first.err
        assert "64 of 128 experts per layer" in first.err
        assert "seed 7" in first.err
        again = generate(cli, "-p", "The Debian", "-n", "8", "--seed", "7", "--keep", "0-63")
        assert again.out == first.out

    def test_reported_seed_gives_the_same_text(self, cli: Cli) -> None:
        first = json.loads(generate(cli, "-p", "The", "-n", "8", "--json").out)
        again = json.loads(generate(cli, "-p", "The", "-n", "8", "--json", "--seed", str(first["seed"])).out)
        assert again["tokens"] == first["tokens"]
        assert first["text"] == again["text"]
        assert (first["stop_reason"], first["experts_held"]) == ("length", None)

    def test_prompt_from_file_and_stdin(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "prompt.txt"
        path.write_bytes("Über\r\n".encode())
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO("Über\n".encode())))
        for source in (path, "-"):
            assert json.loads(generate(cli, "-f", source, "-n", "1", "--json").out)["prompt"] == "Über"
        path.write_bytes(b"\xff")
        assert generate(cli, "-f", path).code == 2

    def test_keep_file(self, cli: Cli, tmp_path: Path) -> None:
        path = tmp_path / "node.keep"
        path.write_text("0: 0-7\n1: all\n2: 0-63\n3: 8-15\n4: 8-15\n")
        done = json.loads(generate(cli, "-p", "The", "-n", "1", "--keep", path, "--json").out)
        assert done["experts_held"] == [8, 128, 64, 8, 8]
        assert "8-128 of 128 experts" in generate(cli, "-p", "The", "-n", "1", "--keep", path).err

    def test_greedy_and_stop(self, cli: Cli) -> None:
        greedy = ("-p", "The Debian", "--temperature", "0", "-n", "12", "--json")
        text = json.loads(generate(cli, *greedy).out)["text"]
        stop = text[3:5]
        done = json.loads(generate(cli, *greedy, "--stop", "never this", "--stop", stop).out)
        assert done["stop_reason"] == "stop"
        assert done["text"] == text[: text.index(stop)]


class TestProgress:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    def test_only_on_a_terminal(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(output, "PATIENCE_SECONDS", 0.0)
        with output.progress() as update:
            update("working", 0.5)
        assert capsys.readouterr() == ("", "")

    def test_bar_of_what_reports_rarely(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = self.Terminal()
        monkeypatch.setattr(sys, "stderr", shown)
        monkeypatch.setattr(output, "PATIENCE_SECONDS", 0.01)
        with output.progress() as update:
            update("working", 0.0)
            for _ in range(500):
                if "working" in shown.getvalue():
                    break
                time.sleep(0.01)
        assert "working" in shown.getvalue()

    def test_tokens_per_second_are_those_of_this_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter((100.0, 104.0))
        monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
        said: list[tuple[str, float]] = []
        show = output.tokens_per_second(lambda what, fraction: said.append((what, fraction)), "reading")
        show(1000, 4000)
        show(3000, 4000)
        assert said == [("reading", 0.25), ("reading, 500 tokens/s", 0.75)]

    def test_bar_of_what_takes_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = self.Terminal()
        monkeypatch.setattr(sys, "stderr", shown)
        with output.progress() as update:
            update("working", 0.5)
        assert "working" not in shown.getvalue()
        monkeypatch.setattr(output, "PATIENCE_SECONDS", 0.0)
        with output.progress() as update:
            update("working", 0.5)
        assert "working" in shown.getvalue()
        assert "50%" in shown.getvalue()


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 * 2**10, 200 * 2**20, 17.25 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "200 MiB",
        "17.2 GiB",
    ]


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": [float("inf"), 1.5], "b": (float("nan"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None]}
