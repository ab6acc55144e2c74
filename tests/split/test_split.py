"""Splitting, verifying, merging and loading parts, as a Python user meets them; on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shard_files import typical_difference

import moeshard
from moeshard import GGUFMap, MoeshardError
from moeshard.keep.text import Keep

N_LAYER, N_EXPERT, N_USED = 5, 128, 8


@pytest.fixture(scope="module")
def halves() -> list[Keep]:
    rng = np.random.default_rng(3)
    keep = np.zeros((N_LAYER, N_EXPERT), dtype=bool)
    for row in keep:
        row[rng.choice(N_EXPERT, N_EXPERT // 2, replace=False)] = True
    return [keep, ~keep]


@pytest.fixture(scope="module")
def tokens(tinymoe: Path) -> np.ndarray:
    model = moeshard.Model(tinymoe, n_threads=1)
    return model.tokenize(moeshard.embedded_text("en"))[:150]


def test_shards_hold_what_was_asked_for(tinymoe: Path, halves: list[Keep], tmp_path: Path) -> None:
    written = moeshard.split(tinymoe, halves, tmp_path / "new" / "folder", names=["left", "right"])
    assert [Path(shard.paths[0]).name for shard in written] == ["tinymoe.left.gguf", "tinymoe.right.gguf"]
    source = GGUFMap(tinymoe)
    for shard, keep in zip(written, halves, strict=True):
        assert shard.bytes == os.path.getsize(shard.paths[0])
        assert (shard.kind, shard.n_expert) == ("shard", 64)
        file = GGUFMap(shard.paths[0])
        for name in ("ffn_up_exps", "ffn_gate_inp"):
            for layer in range(N_LAYER):
                for number, expert in enumerate(np.flatnonzero(keep[layer])):
                    ours, theirs = file.expert(layer, name, number), source.expert(layer, name, int(expert))
                    np.testing.assert_array_equal(ours, theirs)
        assert file.metadata["qwen3moe.expert_count"] == 64
        assert file.metadata["moeshard.experts"] == N_EXPERT
        assert json.loads(file.metadata["moeshard.plan"])["node"] == shard.name


def test_every_way_of_loading_a_shard_computes_the_same(
    tinymoe: Path, halves: list[Keep], tokens: np.ndarray, tmp_path: Path
) -> None:
    keep = halves[0]
    (single,) = moeshard.split(tinymoe, keep, tmp_path / "one.gguf")
    parts = moeshard.split(tinymoe, keep, tmp_path / "parts.gguf", max_file_size=2 << 20)[0].paths
    trunk, experts = moeshard.split(tinymoe, [keep], tmp_path, trunk_once=True)
    assert len(parts) > 2 and all(os.path.getsize(part) <= 2 << 20 for part in parts)

    models = [
        moeshard.Model(single.paths[0], n_threads=1),
        moeshard.Model(single.paths[0], n_threads=1, mmap=False),
        moeshard.Model(parts[0], n_threads=1),
        moeshard.Model(tinymoe, keep=keep, n_threads=1),
        moeshard.Model(trunk=trunk.paths[0], experts=experts.paths[0], n_threads=1),
    ]
    wanted = models[0].logits(tokens)
    for model in models:
        assert (model.n_expert, model.n_expert_used) == (64, N_USED)
        np.testing.assert_array_equal(model.logits(tokens), wanted)
        np.testing.assert_array_equal(model.expert_ids[1], np.flatnonzero(keep[1]))
        assert model.expert_bytes == models[0].expert_bytes
    # Rounding in a softmax over fewer numbers, which quantised activations make larger; the same experts all the same.
    whole = moeshard.Model(tinymoe, n_threads=1)
    masked = whole.logits(tokens, keep)
    assert typical_difference(wanted, masked) < 0.02
    assert np.abs(wanted - whole.logits(tokens)).max() > 0.2 * np.abs(masked).max()
    ids = models[0].trace(tokens).ids[0]
    np.testing.assert_array_equal(models[0].expert_ids[0][ids], whole.trace(tokens, keep).ids[0])


def test_experts_in_order_of_contiguous_ids_are_exact(tinymoe: Path, tokens: np.ndarray) -> None:
    """Dropped experts at the end leave the order of the softmax's sum as it is."""
    part = moeshard.Model(tinymoe, keep="0-63", n_threads=1)
    whole = moeshard.Model(tinymoe, n_threads=1)
    np.testing.assert_array_equal(part.logits(tokens), whole.logits(tokens, "0-63"))


def test_a_loaded_part_reads_and_holds_only_itself(tinymoe: Path, tmp_path: Path) -> None:
    """In processes of their own: what the kernel says was allocated."""
    script = """
import sys, psutil, moeshard
keep = None if sys.argv[2] == "all" else sys.argv[2]
before = psutil.Process().memory_full_info().uss
model = moeshard.Model(sys.argv[1], keep=keep, mmap=False)
print(psutil.Process().memory_full_info().uss - before, model.trunk_bytes + model.expert_bytes)
"""
    used = {}
    for keep in ("all", "0-15"):
        run = subprocess.run([sys.executable, "-c", script, tinymoe, keep], capture_output=True, text=True, check=True)
        used[keep], weights = map(int, run.stdout.split())
        assert used[keep] > weights
    # Seven eighths of 9.6 MiB of experts.
    assert used["all"] - used["0-15"] > 7 << 20


def test_merging_gives_the_model_back(tinymoe: Path, halves: list[Keep], tmp_path: Path) -> None:
    written = moeshard.split(tinymoe, halves, tmp_path)
    assert moeshard.merge([shard.paths[0] for shard in written], tmp_path / "whole.gguf") == [
        str(tmp_path / "whole.gguf")
    ]
    assert (tmp_path / "whole.gguf").read_bytes() == tinymoe.read_bytes()
    with pytest.raises(MoeshardError, match="none of them holds experts"):
        moeshard.merge([written[0].paths[0]], tmp_path / "half.gguf")
    assert not (tmp_path / "half.gguf").exists()


def test_verify_finds_a_changed_byte(tinymoe: Path, halves: list[Keep], tmp_path: Path) -> None:
    (shard,) = moeshard.split(tinymoe, halves[0], tmp_path / "shard.gguf")
    path = Path(shard.paths[0])
    found = moeshard.verify(path, tinymoe, logits=True, n_threads=1)
    assert found.bytes == shard.bytes and found.n_expert == 64
    assert found.logits is not None and found.logits.agrees

    file = GGUFMap(path)
    info = next(info for info in file.tensor_infos if info.name == "blk.2.ffn_down_exps.weight")
    good = path.read_bytes()
    number = 17
    at = info.offset + number * (info.nbytes // 64) + 5
    expert = int(np.flatnonzero(halves[0][2])[number])
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(MoeshardError, match=rf"blk\.2\.ffn_down_exps\.weight' \(expert {expert} of the model\)"):
        moeshard.verify(path, tinymoe)
    path.write_bytes(good[:-1] + b"\x01" if good[-1] == 0 else good[:-1] + b"\x00")
    with pytest.raises(MoeshardError, match="differs from"):
        moeshard.verify(path, tinymoe)
    path.write_bytes(good)
    assert moeshard.verify(path, tinymoe).bytes == len(good)
    path.write_bytes(good + b"\0")
    with pytest.raises(MoeshardError, match="differs from"):
        moeshard.verify(path, tinymoe)


def test_verify_knows_the_wrong_source(tinymoe: Path, halves: list[Keep], tmp_path: Path) -> None:
    (shard,) = moeshard.split(tinymoe, halves[0], tmp_path / "shard.gguf")
    other = bytearray(tinymoe.read_bytes())
    info = GGUFMap(tinymoe).tensor_infos[0]
    other[info.offset] ^= 1
    (tmp_path / "other.gguf").write_bytes(other)
    with pytest.raises(MoeshardError, match="was not taken from"):
        moeshard.verify(shard.paths[0], tmp_path / "other.gguf")
    with pytest.raises(MoeshardError, match="is not a shard"):
        moeshard.verify(tinymoe, tinymoe)


def test_other_experts_per_token(tinymoe: Path, halves: list[Keep], tokens: np.ndarray, tmp_path: Path) -> None:
    (shard,) = moeshard.split(tinymoe, halves[0], tmp_path / "12.gguf", n_expert_used=12)
    model = moeshard.Model(shard.paths[0], n_threads=1)
    assert model.trace(tokens).ids.shape == (N_LAYER, len(tokens), 12)
    assert moeshard.verify(shard.paths[0], tinymoe, logits=True, n_threads=1).logits
    masked = moeshard.Model(tinymoe, n_expert_used=12, n_threads=1).logits(tokens, halves[0])
    assert typical_difference(model.logits(tokens), masked) < 0.02
    # Fewer experts than a token uses.
    with pytest.raises(MoeshardError, match="clamp"):
        moeshard.split(tinymoe, "0-4", tmp_path / "5.gguf")
    (shard,) = moeshard.split(tinymoe, "0-4", tmp_path / "5.gguf", clamp=True)
    assert moeshard.Model(shard.paths[0], n_threads=1).n_expert_used == 5
    assert moeshard.verify(shard.paths[0], tinymoe).n_expert == 5
    for used in (0, -1, 129):
        with pytest.raises(MoeshardError, match="n_expert_used"):
            moeshard.Model(tinymoe, n_expert_used=used)


def test_plans(tinymoe: Path, tmp_path: Path) -> None:
    scores = np.random.default_rng(5).random((N_LAYER, N_EXPERT))
    moeshard.write_ranking(tmp_path / "ranking.csv", scores, range(N_LAYER))
    plan = moeshard.plan_groups(tinymoe, 4, "snake", ranking=tmp_path / "ranking.csv", replicate=4, n_expert_used=6)
    plan.write(tmp_path / "plan.json")
    written = moeshard.split(tinymoe, moeshard.read_plan(tmp_path / "plan.json"), tmp_path / "out", only=2)
    assert [shard.name for shard in written] == ["group-2"]
    model = moeshard.Model(written[0].paths[0], n_threads=1)
    assert (model.n_expert, model.n_expert_used) == (4 + 31, 6)
    for layer in range(N_LAYER):
        assert set(np.argsort(-scores[layer])[:4]) <= set(model.expert_ids[layer])

    with pytest.raises(MoeshardError, match="contiguous groups .* use no ranking; leave out --ranking"):
        moeshard.plan_groups(tinymoe, 4, ranking=tmp_path / "ranking.csv")
    other = tmp_path / "other.gguf"
    moeshard.split(tinymoe, "0-63", other)
    with pytest.raises(MoeshardError):
        moeshard.split(other, plan, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_dry_run_says_what_happens_and_does_nothing(tinymoe: Path, halves: list[Keep], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for options in ({}, {"trunk_once": True}, {"max_file_size": 1 << 21}):
        said = moeshard.split(tinymoe, halves, folder, dry_run=True, force=True, **options)
        assert not folder.exists()
        done = moeshard.split(tinymoe, halves, folder, force=True, **options)
        assert said == done
        for shard in done:
            assert sum(os.path.getsize(path) for path in shard.paths) == shard.bytes
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_arguments_that_do_not_go_together(tinymoe: Path, halves: list[Keep], tmp_path: Path) -> None:
    with pytest.raises(MoeshardError, match="either the path"):
        moeshard.Model()
    with pytest.raises(MoeshardError, match="either the path"):
        moeshard.Model(trunk=tinymoe)
    with pytest.raises(MoeshardError, match="go with the path"):
        moeshard.Model(trunk=tinymoe, experts=tinymoe, keep="0-63")
    with pytest.raises(MoeshardError, match="not a trunk|is not a shard"):
        moeshard.Model(trunk=tinymoe, experts=tinymoe)
    with pytest.raises(MoeshardError, match="as many names"):
        moeshard.split(tinymoe, halves, tmp_path, names=["one"])
    with pytest.raises(MoeshardError, match="no shard 2"):
        moeshard.split(tinymoe, halves, tmp_path, only=2)
    with pytest.raises(MoeshardError, match="trunk_once"):
        moeshard.split(tinymoe, halves[0], tmp_path / "x.gguf", trunk_once=True)
    assert not list(tmp_path.iterdir())


def test_expert_views_keep_the_file_and_cannot_be_written(tinymoe: Path) -> None:
    view = GGUFMap(tinymoe).expert(2, "ffn_gate_inp", 7)
    whole = GGUFMap(tinymoe).tensors["blk.2.ffn_gate_inp.weight"]
    np.testing.assert_array_equal(view, whole[7])
    assert view.base is not None and not view.flags.writeable
    for layer, name, expert in ((2, "ffn_gate_inp", 128), (5, "ffn_gate_inp", 0), (2, "attn_q", 0)):
        with pytest.raises(MoeshardError):
            GGUFMap(tinymoe).expert(layer, name, expert)
