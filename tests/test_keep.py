"""Every way of writing a keep, and what is said about every way of getting it wrong."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeshard import MoeshardError, format_keep, parse_keep
from moeshard.keep.text import Keep, format_ids, format_row

N_LAYER, N_EXPERT = 4, 16
MOE = [1, 3]

WriteFile = Callable[[str | bytes], pathlib.Path]


def rows(*held: Any) -> Keep:
    keep = np.zeros((len(held), N_EXPERT), dtype=bool)
    for row, ids in zip(keep, held, strict=True):
        row[ids] = True
    return keep


def parse(spec: Any, **options: Any) -> Keep:
    return parse_keep(spec, N_LAYER, N_EXPERT, **options)


@pytest.fixture
def file(tmp_path: pathlib.Path) -> WriteFile:
    def write(text: str | bytes) -> pathlib.Path:
        path = tmp_path / "node.keep"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("0-7,10", [0, 1, 2, 3, 4, 5, 6, 7, 10]),
        ("5", [5]),
        (" 1, 2 4-5\t7 ", [1, 2, 4, 5, 7]),
        ("3,3,2-4", [2, 3, 4]),
        ("0-15", slice(None)),
        ("all", slice(None)),
        ("*", slice(None)),
        ("ALL", slice(None)),
        ("none", []),
    ],
)
def test_list_holds_for_every_layer(text: Any, ids: Any) -> None:
    keep = parse(text)
    assert keep.dtype == bool
    assert np.array_equal(keep, rows(*[ids] * N_LAYER))


def test_arrays() -> None:
    mask = np.arange(64).reshape(4, 16) % 3 == 0
    assert np.array_equal(parse(mask), mask)
    assert not np.shares_memory(parse(mask), mask)
    assert np.array_equal(parse(mask.tolist()), mask)
    assert np.array_equal(parse(mask[1]), np.tile(mask[1], (4, 1)))
    for ids in ([1, 5], np.array([5, 1], dtype=np.uint8), range(1, 6, 4), {1, 5}, frozenset({5, 1})):
        assert np.array_equal(parse(ids), rows(*[[1, 5]] * 4))


def test_file_of_every_layer(file: WriteFile) -> None:
    path = file("# my node\n\n0-3\n5 6,7 # these\n  *\nnone\n")
    expected = rows([0, 1, 2, 3], [5, 6, 7], slice(None), [])
    for spec in (path, str(path), f"@{path}", path.read_text()):
        assert np.array_equal(parse(spec), expected)


def test_file_of_moe_layers_leaves_dense_rows_true(file: WriteFile) -> None:
    assert np.array_equal(parse(file("0\n1\n"), moe_layers=MOE), rows(slice(None), [0], slice(None), [1]))


def test_file_with_prefixes_in_any_order(file: WriteFile) -> None:
    text = "3: 1\n 1 :0-2\n"
    assert np.array_equal(parse(file(text), moe_layers=MOE), rows(slice(None), [0, 1, 2], slice(None), [1]))
    with_dense = parse(file(text + "0: none"), moe_layers=MOE)
    assert np.array_equal(with_dense, rows([], [0, 1, 2], slice(None), [1]))


def test_file_as_other_systems_write_it(file: WriteFile) -> None:
    assert np.array_equal(parse(file(b"\xef\xbb\xbf0\r\n1\r\n2\r\n3\r\n")), np.eye(4, 16, dtype=bool))


def test_file_named_like_a_list(file: WriteFile, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file("0: 0\n1: 0\n2: 0\n3: 0").rename(tmp_path / "0-3")
    monkeypatch.chdir(tmp_path)
    assert parse("0-3").sum() == 16
    for spec in ("@0-3", "./0-3", pathlib.Path("0-3")):
        assert parse(spec).sum() == 4


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", ["nothing given", "'all'"]),
        ("0-7,12-20", ["'12-20' is out of range", "16 experts", "0 to 15"]),
        ("16", ["'16' is out of range"]),
        ("0-99999999", ["out of range"]),
        ("0-999999999999", ["is not an expert"]),
        ("7-3", ["'7-3' runs backwards", "write '3-7'"]),
        ("-3", ["'-3' is not an expert", "0 to 15"]),
        ("3 - 5", ["'-' is not an expert", "no spaces within a range"]),
        ("1-2-3", ["'1-2-3' is not an expert"]),
        ("1,none", ["'none' stands alone"]),
        ("no/such/file", ["'no/such/file'", "neither a list", "nor a file"]),
        ("@no/such/file", ["cannot read keep file 'no/such/file'", "No such file"]),
        ("@.", ["cannot read keep file"]),
        ("@a\0b", ["cannot read keep file", "null"]),
        ([], ["empty"]),
        ([3, 16], ["expert 16", "0 to 15"]),
        ([-1], ["expert -1"]),
        ([0.5], ["float64"]),
        ([[0, 1]], ["int64", ".astype(bool)"]),
        ([0, 1] * 8, ["repeats", ".astype(bool)"]),
        ({1, "a"}, ["keep must be"]),
        ([[1], [1, 2]], ["keep must be"]),
        (np.ones((2, 16), bool), ["(2, 16)", "(4, 16)", "dense"]),
        (np.ones(4, bool), ["(4,)", "(16,)"]),
        (None, ["keep must be"]),
    ],
)
def test_errors(spec: Any, said: list[str]) -> None:
    with pytest.raises(MoeshardError) as error:
        parse(spec)
    for text in said:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0\n1\nx\n3", ["line 3", "'x' is not an expert", "0 to 15"]),
        ("0\n# a\n\n1-16", ["line 4", "'1-16' is out of range"]),
        ("0: 1\n1:\n", ["line 2", "nothing given"]),
        ("0: 1\n1", ["line 2", "prefix", "on every line or on none"]),
        ("0\n1: 1", ["line 2", "prefix"]),
        ("4: 1", ["line 1", "'4' is not a layer", "0 to 3"]),
        ("a: 1", ["line 1", "'a' is not a layer"]),
        (": 1", ["line 1", "'' is not a layer"]),
        ("0-1: 1", ["line 1", "'0-1' is not a layer"]),
        ("1: 1\n1: 2", ["line 2", "layer 1 was already given"]),
        ("1: 1", ["no line for layer 3", "'3: all'"]),
        ("0: 1", ["no line for layers 1, 3", "'1: all'"]),
        ("0-3", ["1 line with experts", "needs 4", "2 for its MoE layers", "give the list itself"]),
        ("1\n2\n3", ["3 lines with experts", "needs 4", "2 for its MoE layers"]),
        ("# nothing\n", ["0 lines with experts"]),
        (b"\xff\xfe0\x001\x00", ["not text"]),
    ],
)
def test_file_errors_name_file_and_line(file: WriteFile, text: Any, said: list[str]) -> None:
    path = file(text)
    with pytest.raises(MoeshardError) as error:
        parse(path, moe_layers=MOE)
    for part in (str(path), *said):
        assert part in str(error.value)


def test_many_missing_layers_are_not_all_listed() -> None:
    with pytest.raises(MoeshardError, match=r"no line for layers 1, 2, 3, 4, 5, 6, 7, 8 and 31 more; .* '1: all'"):
        parse_keep("0: all\n", 40, N_EXPERT)


def test_dense_model() -> None:
    with pytest.raises(MoeshardError, match="dense"):
        parse_keep("0", 4, 0)


def test_format() -> None:
    assert format_keep(rows([0, 1, 2, 5], slice(None), [], [7, 9, 10])) == "0: 0-2,5\n1: all\n2: none\n3: 7,9-10\n"
    assert format_row(np.array([True, False])) == "0"
    assert format_ids([]) == ""
    assert format_ids([0, 1, 5]) == "0-1,5"
    for wrong in (np.ones(3, bool), np.ones((2, 2))):
        with pytest.raises(MoeshardError, match=r"bool array \(n_layer, n_expert\)"):
            format_keep(wrong)


KEEPS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))


@given(KEEPS)
def test_round_trip(keep: Keep) -> None:
    assert np.array_equal(parse_keep(format_keep(keep), *keep.shape), keep)


@given(KEEPS)
def test_round_trip_without_prefixes(keep: Keep) -> None:
    text = "".join(format_row(row) + "\n" for row in keep)
    assert np.array_equal(parse_keep(text, *keep.shape), keep)


@given(st.text(alphabet="0123456789,-:*#@ \n\talnoexy\0é"))
def test_any_text_is_a_keep_or_a_clear_error(text: Any) -> None:
    try:
        shape = parse(text, moe_layers=MOE).shape
    except MoeshardError:
        return
    assert shape == (N_LAYER, N_EXPERT)
