"""Rankings as they are written by us, by other tools and by hand, and what is said about each that is wrong."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshard import MoeshardError
from moeshard.arrays import Doubles
from moeshard.profile.ranking import Ranking, RankingWarning, read_ranking, write_ranking

N_LAYER, N_EXPERT = 4, 3
MOE = [1, 3]

GOOD = "layer,expert,score\n1,0,0.5\n1,1,2\n1,2,1e-3\n3,0,.25\n3,1,0\n3,2,7.\n"
SCORES = np.array([[np.nan] * 3, [0.5, 2, 1e-3], [np.nan] * 3, [0.25, 0, 7]])


def read(tmp_path: Path, data: str | bytes, name: str = "ranking.csv") -> Ranking:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_ranking(path, N_LAYER, N_EXPERT, MOE)


def same(ranking: Ranking, scores: Any) -> bool:
    return ranking.scores.dtype == np.float64 and np.array_equal(ranking.scores, scores, equal_nan=True)


def archive(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        '# by hand, "mostly\n\n' + GOOD.replace("1,1,2", "   \n # heaviest\n 1 , 1 ,\t2 "),
        GOOD.replace("layer,expert,score", "Layer, Expert ,SCORE"),
        GOOD.replace("score", "mass"),
        'score,name,expert,layer\n7,x,2,3\n0.5,,0,1\n2,"a,b",1,1\n0,x,1,3\n.001,x,2,1\n0.25,x,0,3',
    ],
)
def test_csv(tmp_path: Path, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranking = read(tmp_path, text)
    assert same(ranking, SCORES)
    assert ranking.source == str(tmp_path / "ranking.csv")
    assert ranking.scored.tolist() == [False, True, False, True]


def test_layer_may_be_left_out(tmp_path: Path) -> None:
    ranking = read(tmp_path, GOOD[: GOOD.index("3,0")])
    assert ranking.scored.tolist() == [False, True, False, False]


@pytest.mark.parametrize("column", ["mass", "score"])
def test_whole_model_is_used_in_every_layer_with_a_warning(tmp_path: Path, column: str) -> None:
    with pytest.warns(RankingWarning, match="close to random.*moeshard analyze --export-ranking") as caught:
        ranking = read(tmp_path, f"expert,{column},share\n2,9,0.9\n0,1,0.1\n1,0,0\n")
    assert same(ranking, [[np.nan] * 3, [1, 0, 9], [np.nan] * 3, [1, 0, 9]])
    assert caught[0].filename == __file__
    assert str(tmp_path / "ranking.csv") in str(caught[0].message)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["header must be 'layer,expert,score'"]),
        ("# nothing\n\n", ["header must be"]),
        ("1,0,0.5\n", ["line 1", "header must be", "'1,0,0.5'"]),
        ("layer;expert;score\n", ["line 1", "header must be", "'layer;expert;score'"]),
        ("layer,expert,weight\n", ["line 1", "header must be"]),
        ("\nlayer,score\n", ["line 2", "header must be"]),
        ("layer,expert,score,expert\n", ["line 1", "'expert' twice"]),
        ("layer,expert,score\n", ["no layer has scores"]),
        ("expert,mass\n", ["no layer has scores"]),
        (GOOD.replace("1,1,2", "4,1,2"), ["line 3", "'4' is not a layer", "0 to 3"]),
        (GOOD.replace("1,1,2", "-1,1,2"), ["line 3", "'-1' is not a layer"]),
        (GOOD.replace("1,1,2", "x,1,2"), ["line 3", "'x' is not a layer"]),
        (GOOD.replace("1,1,2", "1.0,1,2"), ["line 3", "'1.0' is not a layer"]),
        (GOOD.replace("1,1,2", f"{'9' * 5000},1,2"), ["line 3", "is not a layer"]),
        (GOOD.replace("1,1,2", "2,1,2"), ["line 3", "layer 2 has no experts", "1,3"]),
        (GOOD.replace("1,1,2", "1,3,2"), ["line 3", "'3' is not an expert", "0 to 2"]),
        (GOOD.replace("1,1,2", "1,,2"), ["line 3", "'' is not an expert"]),
        (GOOD.replace("1,1,2", "1,1,"), ["line 3", "'' is not a score"]),
        (GOOD.replace("1,1,2", "1,1,-2"), ["line 3", "'-2' is not a score", "at least 0"]),
        (GOOD.replace("1,1,2", "1,1,nan"), ["line 3", "'nan' is not a score", "finite"]),
        (GOOD.replace("1,1,2", "1,1,inf"), ["line 3", "'inf' is not a score"]),
        (GOOD.replace("1,1,2", "1,1,1e999"), ["line 3", "'1e999' is not a score"]),
        (GOOD.replace("1,1,2", "1,1,1_0"), ["line 3", "'1_0' is not a score"]),
        (GOOD.replace("1,1,2", "1,1,²"), ["line 3", "'²' is not a score"]),
        (GOOD.replace("1,1,2", "1,1,0,5"), ["line 3", "4 columns", "header has 3"]),
        (GOOD.replace("1,1,2", "1,1"), ["line 3", "2 columns"]),
        (GOOD.replace("1,1,2", "1,0,2"), ["line 3", "expert 0 of layer 1 was already given"]),
        (GOOD.replace("1,1,2\n", ""), ["line 3", "layer 1", "expert 1", "leave layer 1 out"]),
        (GOOD.replace("3,0,.25\n3,1,0\n", ""), ["line 5", "layer 3", "experts 0-1"]),
        ("expert,mass\n0,1\n0,2\n", ["line 3", "expert 0 was already given"]),
        ("expert,mass\n0,1\n", ["line 2", "experts 1-2", "give all of them"]),
        (GOOD.replace("1,1,2", '1,1,"2'), ["line 7", "unexpected end"]),
        (GOOD + "1" * 200_000, ["line 8", "field"]),
        (b"layer,expert,score\n1,0,\xff\n", ["not text", "'layer,expert,score'"]),
    ],
)
def test_csv_errors_name_file_and_line(tmp_path: Path, text: str | bytes, said: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a ranking that is refused is not warned about
        with pytest.raises(MoeshardError) as error:
            read(tmp_path, text)
    for part in (str(tmp_path / "ranking.csv"), *said):
        assert part in str(error.value)


@pytest.mark.parametrize(("path", "said"), [("missing.csv", "No such file"), (".", "directory"), ("a\0b", "null")])
def test_unreadable(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(MoeshardError, match=f"cannot read ranking .*{said}"):
        read_ranking(f"{tmp_path}/{path}", N_LAYER, N_EXPERT, MOE)


def test_dense_model(tmp_path: Path) -> None:
    with pytest.raises(MoeshardError, match="dense"):
        read_ranking(tmp_path / "any.csv", 4, 0, [])


@pytest.mark.parametrize("name", ["profile.npz", "a name that says nothing"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
def test_profile(tmp_path: Path, name: str, dtype: Any) -> None:
    saliency = np.arange(12).reshape(4, 3).astype(dtype)
    ranking = read(tmp_path, archive(saliency=saliency, counts=np.ones(5)), name)
    expected = saliency.astype(float)
    expected[[0, 2]] = np.nan
    assert same(ranking, expected)


def test_profile_layers_without_scores(tmp_path: Path) -> None:
    saliency = np.ones((4, 3))
    saliency[[0, 3]] = np.nan
    saliency[2] = -1  # a dense layer's row carries no meaning
    assert read(tmp_path, archive(saliency=saliency)).scored.tolist() == [False, True, False, False]


def with_value(value: float) -> Doubles:
    saliency = np.ones((4, 3))
    saliency[3, 1] = value
    return saliency


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (archive(mass=np.ones((4, 3))), ["no array 'saliency'", "it has mass"]),
        (archive(), ["no array 'saliency'", "it has none"]),
        (archive(saliency=np.ones((3, 4))), ["shape (3, 4)", "(4, 3)", "another model"]),
        (archive(saliency=np.float64(1)), ["shape ()"]),
        (archive(saliency=np.ones((4, 3), dtype=bool)), ["numbers", "bool"]),
        (archive(saliency=np.full((4, 3), "x")), ["numbers", "<U1"]),
        (archive(saliency=np.full((4, 3), None)), ["cannot read profile", "allow_pickle"]),
        (archive(saliency=with_value(-1)), ["expert 1 of layer 3 is -1.0", "at least 0"]),
        (archive(saliency=with_value(np.inf)), ["expert 1 of layer 3 is inf", "finite"]),
        (archive(saliency=with_value(np.nan)), ["expert 1 of layer 3 is nan"]),
        (archive(saliency=np.full((4, 3), np.nan)), ["no layer has scores"]),
        (b"", ["cannot read profile"]),
        (b"layer,expert,score\n", ["cannot read profile"]),
        (b"PK\x03\x04", ["cannot read profile"]),
    ],
)
def test_profile_errors(tmp_path: Path, data: bytes, said: list[str]) -> None:
    with pytest.raises(MoeshardError) as error:
        read(tmp_path, data, "profile.npz")
    for part in (str(tmp_path / "profile.npz"), *said):
        assert part in str(error.value)


def test_array_alone_is_no_profile(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.ones((4, 3)))
    with pytest.raises(MoeshardError, match="cannot read profile"):
        read(tmp_path, (tmp_path / "array.npy").read_bytes(), "profile.npz")


def test_damaged_profile_is_an_error_or_a_ranking(tmp_path: Path) -> None:
    whole = archive(saliency=np.arange(12.0).reshape(4, 3))
    damaged = [whole[:n] for n in range(4, len(whole), 7)]
    damaged += [whole[:n] + bytes([whole[n] ^ 0x55]) + whole[n + 1 :] for n in range(0, len(whole), 3)]
    refused = 0
    for data in damaged:
        try:
            assert read(tmp_path, data, "profile.npz").scores.shape == (4, 3)
        except MoeshardError:
            refused += 1
    assert refused > len(damaged) / 2


@pytest.mark.parametrize("scores", [np.ones(3), np.ones((4, 3), dtype=np.float32)])
def test_ranking_of_other_arrays(scores: Any) -> None:
    with pytest.raises(MoeshardError, match=r"measured: scores must be a float64 array \(n_layer, n_expert\)"):
        Ranking(scores, "measured")


def test_write(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    scores = SCORES.copy()
    scores[0] = 5
    write_ranking(path, scores, MOE)
    assert path.read_text().splitlines()[:3] == ["layer,expert,score", "1,0,0.5", "1,1,2.0"]
    assert same(read_ranking(path, N_LAYER, N_EXPERT, MOE), SCORES)
    with pytest.raises(MoeshardError, match="exists.*--force"):
        write_ranking(path, SCORES, MOE)
    write_ranking(path, SCORES[:, ::-1], MOE, force=True)
    assert same(read_ranking(path, N_LAYER, N_EXPERT, MOE), SCORES[:, ::-1])


@pytest.mark.parametrize(
    ("scores", "said"), [(-SCORES, "at least 0"), (np.where(np.isnan(SCORES), 1, np.nan), "no layer has scores")]
)
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, scores: Any, said: str) -> None:
    with pytest.raises(MoeshardError, match=f"out.csv: .*{said}"):
        write_ranking(tmp_path / "out.csv", scores, MOE)
    assert not list(tmp_path.iterdir())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, allow_infinity=False), min_size=6, max_size=6))
def test_scores_survive_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("scores") / "out.csv"
    scores = np.array(values).reshape(2, 3)
    write_ranking(path, scores, [0, 1])
    assert same(read_ranking(path, 2, 3, [0, 1]), scores)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*"0123.,\n\"'#-; e\0é\x1c\u2028", "layer,expert,score\n", "nan", "1,0,1\n"])))
def test_any_text_is_a_ranking_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    with contextlib.suppress(MoeshardError):
        assert read(tmp_path_factory.mktemp("any"), "".join(parts)).scores.shape == (4, 3)
