"""`moeshard split`, `verify` and `merge` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli

import moeshard


def test_groups_there_and_back(cli: Cli, tinymoe: Path, tmp_path: Path) -> None:
    done = cli("split", "tinymoe", "-o", tmp_path / "out", "--groups", 4)
    assert done.code == 0
    assert "group-3.gguf" in done.out.replace("\n", "") and "32 of 128" in done.out
    shards = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(shards) == 4 and (tmp_path / "out" / "plan.json").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")) == []

    done = cli("verify", shards[1], "--source", "tinymoe", "--logits", "--threads", 1)
    assert done.code == 0
    assert "32 of 128 experts" in done.out and "bit for bit" in done.out

    done = cli("merge", *shards, "-o", tmp_path / "whole.gguf")
    assert done.code == 0
    assert (tmp_path / "whole.gguf").read_bytes() == tinymoe.read_bytes()
    assert "none of them holds experts" in cli("merge", *shards[1:], "-o", tmp_path / "no.gguf").err

    done = cli("generate", shards[0], "-p", "The", "-n", 4, "--threads", 1, "--temperature", 0)
    assert done.code == 0 and done.out


def test_the_plan_beside_shards_makes_them_again(cli: Cli, tmp_path: Path) -> None:
    assert cli("split", "tinymoe", "-o", tmp_path / "a", "--groups", 2).code == 0
    assert cli("split", "tinymoe", "-o", tmp_path / "b", "--plan", tmp_path / "a" / "plan.json").code == 0
    # Not its own file: into the same folder the shards are in the way, the plan is not.
    again = cli("split", "tinymoe", "-o", tmp_path / "a", "--plan", tmp_path / "a" / "plan.json", "--force")
    assert again.code == 0
    for name in ("tinymoe.group-0.gguf", "tinymoe.group-1.gguf", "plan.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_modes_follow_the_ranking(cli: Cli, tmp_path: Path) -> None:
    scores = np.random.default_rng(1).random((5, 128))
    moeshard.write_ranking(tmp_path / "r.csv", scores, range(5))
    for mode in ("tiers", "snake", "balanced"):
        out = tmp_path / mode
        options = ("--mode", mode, "--ranking", tmp_path / "r.csv", "--only", 0, "--json")
        done = cli("split", "tinymoe", "-o", out, "--groups", 4, *options)
        assert done.code == 0
        facts = json.loads(done.out)
        assert [shard["n_expert"] for shard in facts["shards"]] == [32]
        assert facts["bytes"] == Path(facts["shards"][0]["paths"][0]).stat().st_size
        ids = moeshard.Model(facts["shards"][0]["paths"][0], n_threads=1).expert_ids
        best = np.argsort(-scores, axis=1)
        assert all((best[layer, 0] in ids[layer]) for layer in range(5)) or mode == "balanced"
        if mode == "tiers":
            np.testing.assert_array_equal(ids, np.sort(best[:, :32], axis=1))


def test_keep_makes_a_file(cli: Cli, tmp_path: Path) -> None:
    done = cli("split", "tinymoe", "-o", tmp_path / "x.gguf", "--keep", "0-63", "--max-file-size", "2MiB", "--json")
    paths = [Path(path) for path in json.loads(done.out)["shards"][0]["paths"]]
    assert len(paths) > 1 and all(path.stat().st_size <= 2 << 20 for path in paths)
    assert cli("verify", paths[0], "--source", "tinymoe", "--json").code == 0
    done = cli("split", "tinymoe", "-o", tmp_path / "y.gguf", "--keep", "0-63", "--dry-run")
    assert done.code == 0 and "nothing was written" in done.err
    assert not (tmp_path / "y.gguf").exists()


def test_trunk_once(cli: Cli, tmp_path: Path) -> None:
    done = cli("split", "tinymoe", "-o", tmp_path, "--groups", 2, "--trunk-once", "--json")
    shards = json.loads(done.out)["shards"]
    assert [shard["kind"] for shard in shards] == ["trunk", "experts", "experts"]
    for shard in shards:
        assert cli("verify", shard["paths"][0], "--source", "tinymoe").code == 0
    assert cli("merge", *(shard["paths"][0] for shard in shards), "-o", tmp_path / "whole.gguf").code == 0
    assert "none in this file, which is part of a model with 128" in cli("inspect", shards[0]["paths"][0]).out
    assert "64 per layer, 8 per token" in cli("inspect", shards[1]["paths"][0]).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of"),
        (("--groups", "2", "--keep", "0-63"), "give one of"),
        (("--groups", "0"), "--groups"),
        (("--groups", "129"), "129"),
        (("--groups", "2", "--mode", "snake"), "--ranking"),
        (("--groups", "2", "--mode", "random"), "contiguous, balanced, tiers"),
        (("--groups", "2", "--only", "2"), "no shard 2"),
        (("--groups", "32"), "--clamp"),
        (("--keep", "0-63", "--trunk-once"), "--trunk-once"),
        (("--keep", "0-200"), "out of range"),
        (("--keep", "0-63", "--max-file-size", "4 parsecs"), "not a size"),
        (("--keep", "0-63", "--max-file-size", "1KiB"), "too small"),
        (("--plan", "nowhere.json"), "nowhere.json"),
        (("--groups", "2", "--mode", "snake", "--ranking", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_wrong_options_are_named(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cli("split", "tinymoe", "-o", tmp_path / "out", *arguments)
    assert done.code != 0
    assert message in " ".join(done.err.split())
    assert not list(tmp_path.iterdir())


def test_files_in_the_way(cli: Cli, tmp_path: Path) -> None:
    assert cli("split", "tinymoe", "-o", tmp_path / "out", "--groups", 2).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    done = cli("split", "tinymoe", "-o", tmp_path / "out", "--groups", 2)
    assert done.code == 1 and "--force" in done.err
    done = cli("split", "tinymoe", "-o", tmp_path / "out", "--groups", 4)
    assert done.code == 1 and "plan.json" in done.err
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert cli("split", "tinymoe", "-o", tmp_path / "out", "--groups", 2, "--force").code == 0


@pytest.mark.parametrize("ignored", [("--mode", "snake"), ("--replicate", 2), ("--ranking", "scores.csv")])
def test_options_of_groups_are_not_ignored_elsewhere(cli: Cli, ignored: tuple[str, object], tmp_path: Path) -> None:
    done = cli("split", "tinymoe", "-o", tmp_path / "x.gguf", "--keep", "0-63", *ignored)
    assert done.code == 2 and "go with --groups" in " ".join(done.err.split())
