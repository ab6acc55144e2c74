"""Texts, chats and prompts as they come: other line separators, parts, nothing, and what is no UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Cli
from model_copy import copy_with

import moeshard
from moeshard import MoeshardError
from moeshard.files.text import readable
from moeshard.traffic.domains import TextWarning, name_and_path, read_texts

PROGRAM = [sys.executable, "-c", "from moeshard.cli import main; main()"]


TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def templated(tinymoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return copy_with(tinymoe, path, {"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def model(templated: Path) -> moeshard.Model:
    return moeshard.Model(templated, n_threads=1)


def chats(path: Path, *lines: str) -> Path:
    path.write_bytes("\n".join(lines).encode())
    return path


def line(*messages: object) -> str:
    return json.dumps({"messages": list(messages)}, ensure_ascii=False)


def said(content: object, role: str = "user", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def read(path: Path, model: moeshard.Model) -> list[str]:
    (domain,) = read_texts([], [path], model=model)
    assert domain.name == path.stem
    return list(domain.texts)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_lines_end_at_line_feeds_alone(separator: str, model: moeshard.Model, tmp_path: Path) -> None:
    text = f"one{separator}two"
    path = chats(tmp_path / "c.jsonl", line(said(text)), "", line(said("three")) + "\r", "")
    assert read(path, model) == [f"<user>{text}", "<user>three"]


def test_line_numbers_are_those_of_editors(model: moeshard.Model, tmp_path: Path) -> None:
    path = chats(tmp_path / "c.jsonl", line(said("a\u2028b")), "", "nonsense")
    with pytest.raises(MoeshardError, match="c.jsonl, line 3: is not JSON"):
        read(path, model)


def test_parts_are_joined_and_what_is_no_text_is_said(model: moeshard.Model, tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:…"}}
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    path = chats(
        tmp_path / "c.jsonl",
        line(said([{"type": "text", "text": "what is"}, image, image, {"type": "text", "text": "this?"}])),
        line(
            said("ask"), said(None, "assistant", tool_calls=[call, call]), said("4", "tool"), said("four", "assistant")
        ),
        line(said("ask"), {"role": "assistant", "tool_calls": [call]}),
        line(said([image])),
        line(said(None)),
    )
    with pytest.warns(TextWarning) as caught:
        texts = read(path, model)
    assert texts == ["<user>what is\nthis?", "<user>ask<assistant><tool>4<assistant>four", "<user>ask<assistant>"]
    (warning,) = caught
    assert str(warning.message).endswith("c.jsonl': not read: 3 'image_url' parts, 2 empty chats, 3 tool calls")
    assert warning.filename == __file__ or "test_texts" in warning.filename


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "a"},
        {"role": 1, "content": "a"},
        said(3),
        said({"type": "text", "text": "a"}),
        said(["a"]),
        said([{"type": "text"}]),
        said([{"text": "a"}]),
        "a",
    ],
)
def test_what_is_no_message(message: object, model: moeshard.Model, tmp_path: Path) -> None:
    path = chats(tmp_path / "c.jsonl", line(said("good")), line(message))
    with pytest.raises(MoeshardError, match="c.jsonl, line 2: expected"):
        read(path, model)


def test_nothing_but_pictures(model: moeshard.Model, tmp_path: Path) -> None:
    path = chats(tmp_path / "c.jsonl", line(said([{"type": "image"}])))
    with pytest.raises(MoeshardError, match="is empty but for what is no text"):
        read(path, model)


def test_halves_of_characters_are_replaced_and_said(model: moeshard.Model, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "half \\ud83d of \\udc00"}]}')
    with pytest.warns(TextWarning, match="not read: 2 lone surrogates"):
        assert read(path, model) == ["<user>half \ufffd of \ufffd"]


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("some text")
    (domain,) = read_texts([str(path)])
    assert domain.name == "caf\ufffd"  # it is written into files of text
    assert name_and_path(f"mail={path}") == ("mail", str(path))
    assert readable("é\ud800\udfff") == "é\ufffd\ufffd"


def test_analyze_goes_on(cli: Cli, templated: Path, tmp_path: Path) -> None:
    """With a model whose template is known: nothing of a chat stops hours of work."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "\\ud83d ' + "word " * 40 + '"}]}')
    done = cli("analyze", templated, "--chat", path, "-o", tmp_path / "p.npz", "--threads", 1)
    assert done.code == 0, done.err
    assert "1 lone surrogate" in done.err and "TextWarning" not in done.err


def run(*arguments: str | bytes | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})


@pytest.mark.parametrize("option", ["--prompt", "--system"])
def test_prompts_that_are_no_utf_8(option: str) -> None:
    more = ("-p", "a", "--chat") if option == "--system" else ()
    done = run("generate", "tinymoe", option, b"caf\xe9", *more)
    assert done.returncode == 2
    assert f"{option} is not UTF-8 text".encode() in done.stderr and b"Traceback" not in done.stderr


def test_texts_that_are_no_text(tinymoe: Path) -> None:
    model = moeshard.Model(tinymoe, n_threads=1)
    for text in ("caf\udce9", "\ud800"):
        with pytest.raises(MoeshardError, match="holds what is no character"):
            model.tokenize(text)
        with pytest.raises(MoeshardError, match="holds what is no character"):
            model.generate(text)
    done = run("demo", "--prompt", b"caf\xe9")
    assert done.returncode == 1 and b"what is no character" in done.stderr and b"Traceback" not in done.stderr


def test_models_whose_path_is_no_utf_8(tinymoe: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/mod\xe9le.gguf"
    os.symlink(tinymoe, path)
    name = os.fsdecode(path)
    model = moeshard.Model(name, n_threads=1)
    assert model.path == name == moeshard.GGUFMap(name).path
    assert len(list(model.generate("a", max_tokens=2, temperature=0, ignore_end=True))) >= 1
    for command in (["inspect", name, "--json"], ["generate", name, "-p", "a", "-n", "1", "--threads", "1"]):
        done = run(*command)
        assert done.returncode == 0, done.stderr
        if "--json" in command:
            assert json.loads(done.stdout)["path"] == name
    done = run("inspect", os.fsencode(tmp_path) + b"/mod\xe9les.gguf")
    assert done.returncode == 1 and b"cannot open" in done.stderr and b"Traceback" not in done.stderr
    with pytest.raises(MoeshardError) as caught:
        moeshard.GGUFMap(name + "s")
    assert str(caught.value).startswith(f"{name}s: ")
