"""Rankings: how much each expert of each layer is worth holding, read from a table or a profile and written back.

A ranking is read from

- CSV with a header, one row per layer and expert, larger scores for experts to hold::

      layer,expert,score
      0,0,0.0132
      0,1,0.0005

- CSV of the older form ``expert,mass`` for the whole model, with a `RankingWarning`;
- a profile (``.npz``) with an array ``saliency``, ``(n_layer, n_expert)``.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Doubles
from moeshard.files.atomic import write_atomically
from moeshard.keep.text import format_ids

# An .npz is a zip file; the second is that of an empty one.
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
# More digits than this are no layer or expert of any model, and int() has a limit of its own.
_ID = re.compile(r"[0-9]{1,9}", re.ASCII)
# float() takes more: 1_000, nan, digits of other scripts.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?", re.ASCII | re.IGNORECASE)
_EXAMPLE = "'layer,expert,score'"


class RankingWarning(UserWarning):
    """A ranking was read whose scores say little about the experts."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """How much each expert is worth holding, layer by layer. Doubles of different layers are not compared."""

    scores: Doubles
    """float64 (n_layer, n_expert): finite and at least 0, larger is better; rows of NaN for layers without scores."""
    source: str
    """Where the scores are from, for messages: a path, or the name of what computed them."""

    def __post_init__(self) -> None:
        """Raise a `MoeshardError` that names source and layer where the scores are not as described."""
        scores = self.scores
        if scores.ndim != 2 or scores.dtype != np.float64:
            raise MoeshardError(
                f"{self.source}: scores must be a float64 array (n_layer, n_expert), got {scores.dtype} {scores.shape}"
            )
        scored = self.scored
        if not scored.any():
            raise MoeshardError(f"{self.source}: no layer has scores, so there is nothing to rank experts by")
        bad = np.argwhere(~(np.isfinite(scores) & (scores >= 0)) & scored[:, None])
        if bad.size:
            layer, expert = bad[0]
            raise MoeshardError(
                f"{self.source}: the score of expert {expert} of layer {layer} is {scores[layer, expert]}; scores must "
                f"be finite and at least 0 (or NaN for a whole layer, where it has none)"
            )

    @property
    def scored(self) -> npt.NDArray[np.bool_]:
        """bool (n_layer,): which layers have scores."""
        scored: npt.NDArray[np.bool_] = np.any(~np.isnan(self.scores), axis=1)
        return scored


def read_ranking(path: str | os.PathLike[str], n_layer: int, n_expert: int, moe_layers: Sequence[int]) -> Ranking:
    """Read the scores of a model's experts from a CSV file or a profile.

    Args:
        path: a CSV file (UTF-8, with or without a byte order mark) whose header names the columns ``layer``, ``expert``
            and ``score``, in any order; ``mass`` may stand for ``score``, and further columns are ignored, as are blank
            lines and lines that begin with ``#``. A MoE layer has each of its experts once, or is left out. Without a
            column ``layer`` the scores are those of every layer, which is close to random: see Warns.
            Or an ``.npz`` file with an array ``saliency``, ``(n_layer, n_expert)``, rows of NaN where a layer has none.
        n_layer, n_expert: of the model.
        moe_layers: the layers that route.

    Returns:
        The ranking; rows of dense layers, and of MoE layers that were left out, are NaN.

    Warns:
        RankingWarning: the scores are for the whole model instead of per layer.

    Raises:
        MoeshardError: the file cannot be read, does not fit the model, or holds something other than scores; naming
            the file, the line or array, and what is expected.
    """
    if not moe_layers:
        raise MoeshardError("this model is dense: it has no experts that a ranking could order")
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            if file.read(4) in _ZIP or name.lower().endswith(".npz"):
                file.seek(0)
                return Ranking(_read_profile(file, name, n_layer, n_expert, moe_layers), name)
            file.seek(0)
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MoeshardError(
            f"cannot read ranking '{name}': it is not text; expected CSV with the header {_EXAMPLE}, or an .npz file"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path that no system call takes
        raise MoeshardError(f"cannot read ranking '{name}': {getattr(error, 'strerror', None) or error}") from error
    return Ranking(_read_csv(text, name, n_layer, n_expert, moe_layers), name)


def write_ranking(
    path: str | os.PathLike[str], scores: npt.ArrayLike, moe_layers: Sequence[int], *, force: bool = False
) -> None:
    """Write the CSV file that `read_ranking` reads, with the very same scores.

    Args:
        path: of the file; it appears whole or not at all.
        scores: ``(n_layer, n_expert)``, finite and at least 0; layers whose row is NaN are left out.
        moe_layers: the layers to write.
        force: whether an existing file is replaced.

    Raises:
        MoeshardError: the scores are not as described, or the file exists or cannot be written.
    """
    ranking = Ranking(_only(moe_layers, np.asarray(scores)), os.fspath(path))
    lines = ["layer,expert,score\n"]
    for layer in np.flatnonzero(ranking.scored):
        lines += (f"{layer},{expert},{score!r}\n" for expert, score in enumerate(ranking.scores[layer].tolist()))
    write_atomically(path, "".join(lines), force=force)


def _read_csv(text: str, source: str, n_layer: int, n_expert: int, moe_layers: Sequence[int]) -> Doubles:
    rows = _rows(text, source)
    where, header = next(rows, (source, []))
    value = next((name for name in ("score", "mass") if name in header), None)
    if value is None or "expert" not in header:
        raise MoeshardError(f"{where}: the header must be {_EXAMPLE}, got '{','.join(header)}'")
    for name in ("layer", "expert", value):
        if header.count(name) > 1:
            raise MoeshardError(f"{where}: the header names '{name}' twice")
    whole_model = "layer" not in header
    columns = {name: index for index, name in enumerate(header)}

    scores = np.full((n_layer, n_expert), np.nan)
    last: dict[int, str] = {}
    # A whole model's scores are read as if they were those of its first MoE layer.
    layer = moe_layers[0] if whole_model else -1
    for where, cells in rows:
        if len(cells) != len(header):
            raise MoeshardError(f"{where}: {len(cells)} columns, but the header has {len(header)}")
        if not whole_model:
            layer = _read_layer(cells[columns["layer"]], where, n_layer, moe_layers)
        expert = _read_id(cells[columns["expert"]])
        if expert is None or expert >= n_expert:
            raise MoeshardError(
                f"{where}: '{cells[columns['expert']]}' is not an expert; the model has {n_expert} per layer, numbered "
                f"from 0 to {n_expert - 1}"
            )
        if not math.isnan(scores[layer, expert]):
            of_layer = "" if whole_model else f" of layer {layer}"
            raise MoeshardError(f"{where}: expert {expert}{of_layer} was already given; give each once")
        scores[layer, expert] = _read_score(cells[columns[value]], where)
        last[layer] = where

    for layer, where in last.items():
        missing = np.flatnonzero(np.isnan(scores[layer]))
        if missing.size:
            rule = "give all of them" if whole_model else f"give all of them, or leave layer {layer} out"
            of_layer = "" if whole_model else f" of layer {layer}"
            raise MoeshardError(
                f"{where}: here the experts{of_layer} end, and no line is for expert"
                f"{'s' if missing.size > 1 else ''} {format_ids(missing)}; {rule}"
            )
    if whole_model and last:
        scores[list(moe_layers)] = scores[moe_layers[0]]
        _warn_whole_model(source)
    return scores


def _rows(text: str, source: str) -> Iterator[tuple[str, list[str]]]:
    """Rows with anything in them, each after the words for where it ends; the first is the header in lower case."""

    def blanked(line: str) -> str:
        return "" if not line.strip() or line.lstrip().startswith("#") else line

    reader = csv.reader(map(blanked, io.StringIO(text, newline=None)), skipinitialspace=True, strict=True)
    header = True
    try:
        for row in reader:
            if row:
                cells = [cell.strip() for cell in row]
                yield f"{source}, line {reader.line_num}", [cell.lower() for cell in cells] if header else cells
                header = False
    except csv.Error as error:
        raise MoeshardError(f"{source}, line {reader.line_num}: {error}") from error


def _read_id(cell: str) -> int | None:
    return int(cell) if _ID.fullmatch(cell) else None


def _read_layer(cell: str, where: str, n_layer: int, moe_layers: Sequence[int]) -> int:
    layer = _read_id(cell)
    if layer is None or layer >= n_layer:
        raise MoeshardError(
            f"{where}: '{cell}' is not a layer; the model has {n_layer} layers, numbered from 0 to {n_layer - 1}"
        )
    if layer not in moe_layers:
        raise MoeshardError(
            f"{where}: layer {layer} has no experts; the layers that do are {format_ids(list(moe_layers))}"
        )
    return layer


def _read_score(cell: str, where: str) -> float:
    score = float(cell) if _NUMBER.fullmatch(cell) else math.nan
    if not (math.isfinite(score) and score >= 0):
        raise MoeshardError(
            f"{where}: '{cell}' is not a score; write a finite number of at least 0, larger for experts to hold"
        )
    return score


def _warn_whole_model(source: str) -> None:
    warnings.warn(
        f"{source} gives each expert one score for the whole model, which is now used in every layer. Expert ids mean "
        f"nothing across layers (expert 5 of one layer and expert 5 of the next are unrelated), so experts chosen by "
        f"such scores are close to random. Make a ranking per layer with `moeshard analyze --export-ranking`.",
        RankingWarning,
        stacklevel=4,  # where read_ranking was called
    )


def _read_profile(file: IO[bytes], source: str, n_layer: int, n_expert: int, moe_layers: Sequence[int]) -> Doubles:
    saliency: Any = None
    try:
        with np.load(file, allow_pickle=False) as profile:
            names = profile.files
            if "saliency" in names:
                saliency = np.asarray(profile["saliency"])
    # Damage raises whatever the part of the archive that it hit does: BadZipFile, zlib.error, KeyError, MemoryError, …
    except Exception as error:
        raise MoeshardError(f"cannot read profile '{source}': it is damaged or no .npz file ({error})") from error
    if saliency is None:
        raise MoeshardError(
            f"profile '{source}' has no array 'saliency' to rank experts by; it has {', '.join(names) or 'none'}"
        )
    if saliency.shape != (n_layer, n_expert):
        raise MoeshardError(
            f"profile '{source}': 'saliency' has shape {saliency.shape}, but the model needs ({n_layer}, {n_expert}); "
            f"is it the profile of another model?"
        )
    if not (np.issubdtype(saliency.dtype, np.floating) or np.issubdtype(saliency.dtype, np.integer)):
        raise MoeshardError(f"profile '{source}': 'saliency' must hold numbers, got {saliency.dtype}")
    return _only(moe_layers, saliency)


def _only(moe_layers: Sequence[int], scores: npt.NDArray[Any]) -> Doubles:
    """Leave out what stands in the rows of dense layers."""
    routed = list(moe_layers)
    result = np.full(scores.shape, np.nan)
    result[routed] = scores[routed]
    return result
