"""Two models that are alike but for one expert, or for a part of the trunk, are told apart; old files still match."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_files import Gguf, Source, add, gb, new_source, refused, small_source
from test_merge_bad import rewrite

import moeshard
from moeshard import GGUFMap, MoeshardError
from moeshard.gguf.fingerprint import HEAD_BYTES, SAMPLE_BYTES, fingerprint, places, same_fingerprint
from moeshard.gguf.identity import identify

N_EXPERT, N_LAYER = 8, 2


def sizeable_source() -> Source:
    """Experts and a trunk that are sampled, not read."""
    source = new_source("qwen3moe", N_LAYER, N_EXPERT, [2] * N_LAYER, 32, 3)
    rng = np.random.default_rng(3)
    add(source, rng, "token_embd.weight", (32, 1024))
    for layer in range(N_LAYER):
        for name, ne in (("gate_inp", (32, 8)), ("gate_exps", (32, 64, 8)), ("up_exps", (32, 64, 8))):
            add(source, rng, f"blk.{layer}.ffn_{name}.weight", ne)
        add(source, rng, f"blk.{layer}.ffn_down_exps.weight", (64, 32, 8), "q8_0")
    return source


def tuned(source: Source, name: str, begin: float, end: float) -> Source:
    """The same with other bytes in one tensor, from one fraction of it to another: as after training that goes on."""
    tensors = list(source.gguf.tensors)
    at = next(index for index, tensor in enumerate(tensors) if tensor.name.decode() == name)
    data = bytearray(tensors[at].data)
    for byte in range(round(begin * len(data)), round(end * len(data))):
        data[byte] ^= 0x11
    tensors[at] = replace(tensors[at], data=bytes(data))
    return replace(source, gguf=replace(source.gguf, tensors=tensors))


def of(source: Source, path: Path) -> str:
    return fingerprint(GGUFMap(source.write(path)))


def test_every_expert_of_every_tensor_counts(tmp_path: Path) -> None:
    source = sizeable_source()
    seen = {of(source, tmp_path / "model.gguf")}
    names = [tensor.name.decode() for tensor in source.gguf.tensors if b"blk" in tensor.name]
    for name in names:
        for expert in range(N_EXPERT):
            seen.add(of(tuned(source, name, expert / N_EXPERT, (expert + 1) / N_EXPERT), tmp_path / "model.gguf"))
    assert len(seen) == 1 + len(names) * N_EXPERT


def test_all_of_the_trunk_counts(tmp_path: Path) -> None:
    source = sizeable_source()
    pieces = [of(tuned(source, "token_embd.weight", i / 8, (i + 1) / 8), tmp_path / "model.gguf") for i in range(8)]
    assert len({of(source, tmp_path / "model.gguf"), *pieces}) == 9


def test_a_part_of_the_rows_of_all_experts_counts(tmp_path: Path) -> None:
    """As after training of some neurons: experts are not all sampled at one place."""
    source, name = sizeable_source(), "blk.0.ffn_up_exps.weight"
    before = of(source, tmp_path / "model.gguf")
    for part in range(4):
        other = source
        for expert in range(N_EXPERT):
            begin = (expert + part / 4) / N_EXPERT
            other = tuned(other, name, begin, begin + 1 / 4 / N_EXPERT)
        assert of(other, tmp_path / "model.gguf") != before


@pytest.mark.parametrize("n_parts", [2, 7])
def test_parts_do_not_matter(n_parts: int, tmp_path: Path) -> None:
    source = sizeable_source()
    assert fingerprint(GGUFMap(source.write_parts(tmp_path, n_parts))) == of(source, tmp_path / "model.gguf")


def test_reading_is_bounded() -> None:
    kimi = 61 * 384 * 3
    slab = 7168 * 2048 // 2
    looks = sum(1 for _ in places(384 * slab, slab)) * 61 * 3
    assert looks == kimi
    assert {size for _, size in places(384 * slab, slab)} == {SAMPLE_BYTES}
    for n_bytes, slice_bytes in ((0, 0), (1, 0), (4 * 384, 4), (5000, 1000), (163_840 * 7168 * 2, 0), (17_000, 0)):
        found = list(places(n_bytes, slice_bytes))
        assert all(at >= 0 and at + size <= n_bytes and 0 < size <= SAMPLE_BYTES for at, size in found)
        assert len(found) <= max(16, n_bytes // SAMPLE_BYTES + 1)
        if n_bytes <= 16 * SAMPLE_BYTES:
            assert sum(size for _, size in found) == n_bytes


def old_fingerprint(path: Path) -> str:
    """What version 0.1 wrote, made anew."""
    file = GGUFMap(path)
    digest, data = hashlib.sha256(), path.read_bytes()
    for key, (at, size) in file.parts[0].entry_ranges.items():
        if not key.startswith("split."):
            digest.update(data[at : at + size])
    for info in file.tensor_infos:
        digest.update(f"{info.name} {info.type} {info.shape}\n".encode())
        digest.update(data[info.offset : info.offset + min(HEAD_BYTES, info.nbytes)])
    return digest.hexdigest()


def test_the_older_form_matches(tmp_path: Path) -> None:
    path = sizeable_source().write(tmp_path / "model.gguf")
    new, old = fingerprint(GGUFMap(path)), old_fingerprint(path)
    assert new.partition(".")[0] == old
    other = old + "." + "0" * 32
    assert same_fingerprint(old, new) and same_fingerprint(new, old) and same_fingerprint(new, new)
    assert same_fingerprint(old, other) and not same_fingerprint(new, other)
    assert not same_fingerprint(old, "0" * 64) and not same_fingerprint("0" * 64, new) and not same_fingerprint("", new)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same with expert 5 of layer 1 trained on; each in two shards beside it."""
    source = sizeable_source()
    paths = []
    for name, model in (("a", source), ("b", tuned(source, "blk.1.ffn_up_exps.weight", 5 / 8, 6 / 8))):
        (tmp_path / name).mkdir()
        paths.append(model.write(tmp_path / name / "model.gguf"))
        moeshard.split(paths[-1], ["0-3", "4-7"], tmp_path / name)
    return paths[0], paths[1]


def shard(model: Path, number: int) -> Path:
    return model.with_name(f"model.group-{number}.gguf")


def test_shards_of_two_models_are_not_merged(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    for shards in (
        [shard(a, 0), shard(b, 1)],
        [shard(b, 0), shard(a, 1)],
        [shard(a, 0), shard(b, 0), shard(b, 1)],
        [shard(b, 0), shard(b, 1), shard(a, 1)],
    ):
        with refused(tmp_path, "was taken from another model than"):
            moeshard.merge(shards, tmp_path / "merged.gguf")
    with refused(tmp_path, "fingerprints differ"):
        moeshard.verify(shard(b, 0), a)
    moeshard.merge([shard(b, 0), shard(b, 1)], tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == b.read_bytes()


def test_a_plan_of_one_is_not_for_the_other(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    plan = moeshard.plan_groups(GGUFMap(a), 2, "contiguous")
    with pytest.raises(MoeshardError, match="the plan was made for"):
        moeshard.split(b, plan, tmp_path / "out")
    plan.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "old.json").write_text(text.replace(plan.model.fingerprint, old_fingerprint(a)))
    moeshard.split(a, moeshard.read_plan(tmp_path / "old.json"), tmp_path / "out")


def aged(path: Path) -> Path:
    """A shard as version 0.1 wrote it: with the older fingerprint."""
    key = "moeshard.fingerprint"
    old = GGUFMap(path).metadata[key].partition(".")[0]
    return rewrite(path, path.with_name(f"old-{path.name}"), {key: Gguf().kv(key, gb.STRING, old)})


def test_older_shards_still_merge(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = two
    old = [aged(shard(a, number)) for number in range(2)]
    moeshard.merge([old[0], shard(a, 1)], tmp_path / "mixed.gguf")
    moeshard.merge(old, tmp_path / "old.gguf")
    assert (tmp_path / "mixed.gguf").read_bytes() == (tmp_path / "old.gguf").read_bytes() == a.read_bytes()


def test_older_shards_of_two_models_show_by_what_both_hold(tmp_path: Path) -> None:
    source = sizeable_source()
    others = {
        "tensor 'token_embd.weight'": tuned(source, "token_embd.weight", 0.5, 1),
        "expert 5 of tensor 'blk.1.ffn_up_exps.weight'": tuned(source, "blk.1.ffn_up_exps.weight", 5 / 8, 6 / 8),
    }
    shards = {}
    for number, (name, model) in enumerate({"": source, **others}.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        model.write(folder / "model.gguf")
        written = moeshard.split(folder / "model.gguf", ["0-5", "4-7"], folder)
        shards[name] = [aged(Path(part.paths[0])) for part in written]
    first = shards.pop("")
    for name, (low, high) in shards.items():
        for pair in ((first[0], high), (low, first[1])):
            with refused(tmp_path, f"was taken from another model than .*: {name} differs"):
                moeshard.merge(pair, tmp_path / "merged.gguf")


def test_models_are_known_whatever_they_are_called(tmp_path: Path) -> None:
    one = identify(GGUFMap(small_source().write(tmp_path / "one.gguf")))
    assert replace(one, name="other", facts={"bytes": 1}).is_same(one)
    for change in ({"arch": "other"}, {"n_layer": 5}, {"n_expert": 16}, {"moe_layers": [1]}, {"fingerprint": "0" * 64}):
        assert not replace(one, **change).is_same(one)  # type: ignore[arg-type]
