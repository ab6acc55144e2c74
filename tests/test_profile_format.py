"""Files of profiles: what they hold, older versions, and what an analysis leaves that is killed at any point."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from old_profiles import ARRAYS, old_file
from test_planner import profile_of

import moeshard
from moeshard import MoeshardError
from moeshard.gguf.identity import ModelIdentity
from moeshard.profile.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from moeshard.profile.growth import Growth, Keeper
from moeshard.profile.measure import analyze
from moeshard.profile.packed import VALUES, Packed, Room, extended, first, pack, packed, regrouped
from moeshard.profile.record import Profile, read_profile, unfinished
from moeshard.runtime.session import Statistics
from moeshard.traffic.domains import Domain

N_LAYER, N_EXPERT, N_DOMAIN = 3, 20, 2
MODEL = ModelIdentity("made up", "qwen3moe", "0" * 64, N_LAYER + 1, N_EXPERT, [1, 2, 3])


def arrays_of(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """What some sequences use, of magnitudes that float16 does not have, from one row to the next."""
    count = rng.poisson(rng.choice([0.1, 1, 8], (n, N_LAYER, 1)), (n, N_LAYER, N_EXPERT)).astype(np.int32)
    size = 10.0 ** rng.integers(-12, 12, (n, N_LAYER, 1))
    mass = (count * rng.gamma(0.5, size=count.shape)).astype(np.float32)
    saliency = (mass * size * rng.gamma(0.5, size=count.shape)).astype(np.float32)
    return {"count": count, "mass": mass, "saliency": saliency, "energy": np.square(saliency)}


def batch(rng: np.random.Generator, n: int) -> Statistics:
    """What a batch of one domain adds up to."""
    arrays = arrays_of(rng, n)
    contributions = rng.gamma(0.5, size=(50, N_LAYER, N_EXPERT)) * (rng.random((50, N_LAYER, N_EXPERT)) < 0.3)
    chosen = contributions > 0
    return Statistics(
        **arrays,
        entropy=rng.random((n, N_LAYER)),
        peak=rng.random((N_LAYER, N_EXPERT)).astype(np.float32),
        together=np.einsum("tma,tmb->mab", chosen, chosen, dtype=np.int32, casting="unsafe"),
        cosaliency=np.einsum("tma,tmb->mab", contributions, contributions).astype(np.float32),
    )


def empty(n: int) -> Profile:
    domain = (np.arange(n) // 4 % N_DOMAIN).astype(np.int32)
    return unfinished(MODEL, ["a", "b"], np.array([1, 2, 3], dtype=np.int32), domain, None, {"seconds": 0.0})


def grown(n: int, path: Path | None = None, *, from_: int = 0, resume: bool = False) -> Growth:
    """An analysis of n sequences, four a batch, kept in a file after each."""
    wanted = empty(n)
    growth = Growth.resume(path, wanted) if resume and path is not None else Growth(wanted)
    keeper = None if path is None else Keeper(growth, path, resumed=resume)
    for at in range(growth.n, n, 4):
        growth.add([64, 63, 64, 61], int(wanted.domain[at]), batch(np.random.default_rng(at), 4))
        growth.profile.facts["seconds"] = float(at)
        if keeper is not None:
            keeper.keep()
    if keeper is not None:
        keeper.close()
    return growth


def assert_same(found: Profile, wanted: Profile) -> None:
    assert (found.model, found.domains, found.facts) == (wanted.model, wanted.domains, wanted.facts)
    for name in ARRAYS:
        a, b = np.asarray(getattr(found, name)), np.asarray(getattr(wanted, name))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_rounding_is_within_its_bound() -> None:
    arrays = arrays_of(np.random.default_rng(0), 300)
    sequences = packed(arrays)
    for name, array in arrays.items():
        found = np.asarray(sequences.array(name), dtype=np.float64)
        if name == "count":
            np.testing.assert_array_equal(found, array)
            continue
        largest = array.max(axis=2, keepdims=True, initial=0).astype(np.float64)
        relative = 2**-10 + 2**-22 if name == "energy" else 2**-11
        error = np.abs(found - array)
        # Squares are taken out in float32, and their roots were taken in it.
        assert (error <= (relative + 4 * 2**-24) * array + largest * 2**-24).all()
        # What any keep captures of a row, by that.
        keep = np.random.default_rng(1).random(array.shape) < 0.3
        whole = array.sum(axis=2, dtype=np.float64)
        share = (array * keep).sum(axis=2, dtype=np.float64) / np.where(whole > 0, whole, 1)
        again = found.sum(axis=2)
        shifted = (found * keep).sum(axis=2) / np.where(again > 0, again, 1)
        assert np.abs(share - shifted).max() <= 2 * relative + N_EXPERT * 2**-23
    again = packed({name: np.asarray(sequences.array(name)) for name in VALUES})
    for name in VALUES:
        np.testing.assert_array_equal(again.array(name), sequences.array(name))


def test_packed_arrays_are_read_as_any() -> None:
    arrays = arrays_of(np.random.default_rng(2), 130)
    sequences = packed(arrays)
    for name in VALUES:
        array = sequences.array(name)
        plain = np.asarray(array)
        assert array.shape == plain.shape and array.dtype == plain.dtype == arrays[name].dtype
        chosen = np.random.default_rng(3).random(130) < 0.2
        for index in (5, -1, slice(3, 90, 7), chosen, np.array([7, 7, 1]), (4, 2), (slice(2), 1), (chosen, ..., 3), []):
            np.testing.assert_array_equal(array[index], plain[index])
        np.testing.assert_array_equal(np.stack(list(array)), plain)
        np.testing.assert_array_equal(array * 2, plain * 2)
        assert array.sum() == plain.sum() and array.any(axis=(0, 2)).tolist() == plain.any(axis=(0, 2)).tolist()
        for dtype in (None, np.float64):  # which is summed up in another order
            found, wanted = array.sum(axis=0, dtype=dtype), plain.sum(axis=0, dtype=dtype)
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(found, wanted, rtol=130 * 2**-23)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            getattr(array, "nothing")  # noqa: B009
        for a, b in zip(regrouped({name: array}, 4).values(), regrouped({name: plain}, 4).values(), strict=True):
            assert isinstance(a, Packed) and a.shape == (130, 4 * N_LAYER, N_EXPERT // 4)
            np.testing.assert_array_equal(a, b)


def test_room_for_sequences() -> None:
    arrays = arrays_of(np.random.default_rng(4), 90)
    whole = packed(arrays)
    room = Room((90, N_LAYER, N_EXPERT))
    for at in (0, 20, 20, 70):
        room.add(pack({name: array[room.n : at] for name, array in arrays.items()}))
        assert room.n == at
    for since in (0, 20, 33):
        for name in VALUES:
            np.testing.assert_array_equal(room.since(since).array(name), whole.array(name)[since:70])
            np.testing.assert_array_equal(first(whole, since).array(name), whole.array(name)[:since])
            np.testing.assert_array_equal(
                extended(room.since(since), 95).array(name)[: 70 - since], whole.array(name)[since:70]
            )
            assert not extended(room.since(since), 95).array(name)[70 - since :].any()
    # An expert that a sequence chose more often than 16 bits can say.
    often = {name: array[70:].copy() for name, array in arrays.items()}
    often["count"][3, 1, 2] = 70_000
    room.add(pack(often))
    np.testing.assert_array_equal(room.since().array("count"), np.concatenate([arrays["count"][:70], often["count"]]))


def test_a_file_holds_what_was_measured(tmp_path: Path) -> None:
    profile = grown(24).finish()
    profile.save(tmp_path / "p.npz")
    found = read_profile(tmp_path / "p.npz")
    assert_same(found, profile)
    found.save(tmp_path / "again.npz")
    assert_same(read_profile(tmp_path / "again.npz"), profile)
    plain = replace(profile, **{name: np.asarray(getattr(profile, name)) for name in VALUES})
    plain.save(tmp_path / "plain.npz")
    assert_same(read_profile(tmp_path / "plain.npz"), profile)
    np.testing.assert_array_equal(moeshard.read_ranking(tmp_path / "p.npz", 4, 20, [1, 2, 3]).scores, profile.ranking())


def test_older_versions_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    profile = profile_of(rng.gamma(0.5, size=(12, 2, 12)).astype(np.float32), [0, 1, 2] * 4, 12)
    old_file(tmp_path / "2.npz", profile, 2)
    assert_same(read_profile(tmp_path / "2.npz"), profile)
    old_file(tmp_path / "1.npz", profile, 1)
    found = read_profile(tmp_path / "1.npz")
    estimated = ("energy", "cosaliency")
    assert_same(replace(found, **{name: getattr(profile, name) for name in estimated}), profile)
    np.testing.assert_allclose(found.energy, profile.saliency**2 / np.maximum(profile.count, 1), rtol=1e-5)
    for index, own in enumerate(found.cosaliency):
        np.testing.assert_allclose(
            np.einsum("mee->me", own), np.asarray(found.energy)[profile.domain == index].sum(axis=0), rtol=1e-5
        )
    assert all(keep.sum() == 2 * 4 for keep in moeshard.planning.planner.choose_experts(found, [4, 4]))
    old_file(tmp_path / "4.npz", profile, 4)
    with pytest.raises(MoeshardError, match=r"4\.npz.*version 4.*update moeshard"):
        read_profile(tmp_path / "4.npz")


def test_version_1_is_exact_where_experts_contribute_evenly(tmp_path: Path) -> None:
    # Each token chooses two experts, and each expert contributes the same to all of its tokens.
    rng = np.random.default_rng(6)
    each = rng.gamma(2, size=8)
    tokens = np.zeros((5, 30, 1, 8))
    for token in tokens.reshape(-1, 8):
        token[chosen] = each[chosen := rng.choice(8, 2, replace=False)]
    chosen = tokens > 0
    profile = replace(
        profile_of(tokens.sum(axis=1), [0] * 5, 8),
        count=chosen.sum(axis=1).astype(np.int32),
        energy=(tokens**2).sum(axis=1).astype(np.float32),
        together=np.einsum("stma,stmb->mab", chosen, chosen, dtype=np.int32, casting="unsafe")[None],
        cosaliency=np.einsum("stma,stmb->mab", tokens, tokens).astype(np.float32)[None],
    )
    old_file(tmp_path / "1.npz", profile, 1)
    found = read_profile(tmp_path / "1.npz")
    np.testing.assert_allclose(found.energy, profile.energy, rtol=1e-5)
    np.testing.assert_allclose(found.cosaliency, profile.cosaliency, rtol=1e-4)


class Recorder:
    """A file that also remembers what was written to it, and where."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.writes: list[tuple[int, bytes]] = []

    def write(self, data: bytes) -> int:
        self.writes.append((self._file.tell(), bytes(data)))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def kills(begun: bytes, writes: list[tuple[int, bytes]], n: int) -> Iterator[bytes]:
    """What a process leaves that is killed before a write, or within it at one of n places."""
    image = bytearray(begun)
    for at, data in writes:
        for end in sorted({0, 1, *np.linspace(0, len(data) - 1, n).astype(int).tolist()}):
            torn = bytearray(image)
            torn[at : at + end] = data[:end]
            yield bytes(torn)
        image[at : at + len(data)] = data
    yield bytes(image)


def test_killed_at_any_point_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = grown(24).finish()
    part = tmp_path / "part"
    growth = Growth(empty(24))
    keeper = Keeper(growth, part, resumed=False)
    begun = part.read_bytes()
    recorder = keeper._file._file = Recorder(keeper._file._file)  # type: ignore[assignment]
    for at in range(0, 24, 4):
        growth.add([64, 63, 64, 61], int(whole.domain[at]), batch(np.random.default_rng(at), 4))
        growth.profile.facts["seconds"] = float(at)
        keeper.keep()
    keeper.close()
    reached = []
    for index, image in enumerate(kills(begun, recorder.writes, 2)):
        part.write_bytes(image)
        left = read_profile(part)
        reached.append(n := int((left.n_tokens > 0).sum()))
        for name in ("n_tokens", "count", "entropy"):
            np.testing.assert_array_equal(getattr(left, name)[:n], getattr(whole, name)[:n])
        if index % 7 == 0:
            assert_same(grown(24, part, resume=True).finish(), whole)
    assert reached == sorted(reached) and set(reached) == set(range(0, 25, 4))


def test_a_file_whose_end_is_missing_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    part = tmp_path / "part"
    grown(8, part)
    data = part.read_bytes()
    found = set()
    for length in range(0, len(data), 499):
        part.write_bytes(data[:length])
        try:
            found.add(int((read_profile(part).n_tokens > 0).sum()))
        except MoeshardError as error:
            assert str(part) in str(error)
            found.add(-1)
    assert found == {-1, 0, 4}


def test_pairs_do_not_make_the_file_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "part"
    growth = Growth(empty(40))
    keeper = Keeper(growth, path, resumed=False)
    sizes = [path.stat().st_size]
    for at in range(0, 40, 4):
        growth.add([64] * 4, int(growth.profile.domain[at]), batch(np.random.default_rng(at), 4))
        keeper.keep()
        sizes.append(path.stat().st_size)
    keeper.close()
    pairs = N_LAYER * N_EXPERT * (N_EXPERT + 1) // 2 * 8
    # Once for each domain, and a place for the next.
    assert (np.diff(sizes)[:3] > pairs).all() and (np.diff(sizes)[3:] < pairs).all()


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "part"
    grown(16, path)
    data = bytearray(path.read_bytes())
    _, measured = read_checkpoint(path)
    assert measured is not None
    at = data.find(measured.pairs[0].peak.tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(MoeshardError, match=r"part: is damaged \(the pairs of domain 0"):
        read_profile(path)
    path.write_bytes(b"something else")
    with pytest.raises(MoeshardError, match="part: is not what an interrupted analysis left"):
        read_checkpoint(path)
    with pytest.raises(MoeshardError, match="part"):
        Checkpoint.create(tmp_path / "no" / "part", {})


def test_goes_on_from_what_an_older_version_left(tmp_path: Path) -> None:
    whole = grown(24).finish()
    growth = Growth(empty(24))
    for at in range(0, 12, 4):
        growth.add([64, 63, 64, 61], int(growth.profile.domain[at]), batch(np.random.default_rng(at), 4))
    left = growth.profile
    sequences = growth.everything()
    assert sequences is not None
    dense = unfinished(left.model, left.domains, left.layers, left.domain, sequences, {"seconds": 8.0})
    old_file(tmp_path / "old.npz", dense, 2)
    (tmp_path / "old.npz").rename(tmp_path / "old")
    assert_same(grown(24, tmp_path / "old", resume=True).finish(), whole)
    assert is_checkpoint(tmp_path / "old")


def test_a_killed_process_leaves_what_was_kept(tinymoe: Path, tmp_path: Path) -> None:
    """The real thing: an analysis that is killed, from outside, and gone on with."""
    script = f"""
        import moeshard, moeshard.profile.measure as measure
        from moeshard.traffic.domains import Domain
        measure.SAVE_SECONDS, measure.SAVE_TIMES, measure.BATCH_TOKENS = 0, 0, 128
        model = moeshard.Model({str(tinymoe)!r}, n_threads=1)
        text = Domain("en", (moeshard.embedded_text("en")[:8000],))
        measure.analyze(
            model,
            [text],
            window=64,
            save_to={str(tmp_path / "part")!r},
            progress=lambda *done: print(*done, flush=True),
        )
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        done, total = map(int, line.split())
        if done > total / 3:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    left = read_profile(tmp_path / "part")
    assert 0 < (left.n_tokens > 0).sum() < left.n_tokens.size
    model = moeshard.Model(tinymoe, n_threads=1)
    text = Domain("en", (moeshard.embedded_text("en")[:8000],))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeshard.profile.measure.BATCH_TOKENS", 128)
        whole = analyze(model, [text], window=64)
        found = analyze(model, [text], window=64, save_to=tmp_path / "part", resume=True)
    found.facts["seconds"] = whole.facts["seconds"]
    assert_same(found, whole)
