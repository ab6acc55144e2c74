"""Which experts are held: everything that may stand for a `keep`, read into one boolean array and written back as text.

A keep is a boolean array of shape ``(n_layer, n_expert)``, True where the expert is held. As text it is

- a list, the same for every layer: ``0-63,70``;
- or one line per layer, in a file or in a text with line breaks::

      # layer: experts
      0: 0-63,70
      1: 5 9-20      # commas or spaces
      2: all         # or *
      3: none

  The ``layer:`` prefix stands on every line or on none. Without it there is a line for each layer of the model, or a
  line for each of its MoE layers, in order. With it the order is free, and dense layers may be left out.

Rows of dense layers carry no meaning; where a text leaves them out they are True.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence, Set
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeLayout, MoeshardError

Keep = npt.NDArray[np.bool_]
KeepSpec = Union[str, "os.PathLike[str]", npt.ArrayLike, Set[int]]

# What can only be meant as a list of experts, right or wrong; any other one-line text names a file.
_LIST = re.compile(r"(?:[\s,0-9*-]|all|none)*", re.ASCII | re.IGNORECASE)
# More digits than this are no expert of any model, and int() has a limit of its own.
_TOKEN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII)
_PREFIX = re.compile(r"\s*([^:]*?)\s*:(.*)", re.ASCII | re.DOTALL)

_ALL = ("all", "*")
_NONE = "none"


def parse_keep(spec: KeepSpec, n_layer: int, n_expert: int, *, moe_layers: Sequence[int] | None = None) -> Keep:
    """Read any way of writing a keep.

    Args:
        spec: one of
            bool array ``(n_layer, n_expert)``, or ``(n_expert,)`` for every layer;
            integer array or set of ids, held in every layer;
            text: a list such as ``"0-63,70"`` (every layer), lines (see the module), or the path of a file of lines;
            ``"@path"`` and any `os.PathLike` always name a file.
        n_layer, n_expert: of the model.
        moe_layers: the layers that route, ascending; None: all of them.

    Returns:
        A new bool array ``(n_layer, n_expert)``. Whether the model can route with it (at least its top-k per layer) is
        not looked at here.

    Raises:
        MoeshardError: naming the file, line and token that is wrong, the range that is right, and what to write.
    """
    if n_layer < 1 or n_expert < 1:
        raise MoeshardError("this model is dense: it has no experts that a keep could select")
    layers = list(range(n_layer)) if moe_layers is None else [int(layer) for layer in moe_layers]
    if isinstance(spec, os.PathLike):
        return _parse_file(os.fspath(spec), n_layer, n_expert, layers)
    if not isinstance(spec, str):
        return _from_array(spec, n_layer, n_expert)
    if spec.startswith("@"):
        return _parse_file(spec[1:], n_layer, n_expert, layers)
    if "\n" in spec:
        return _parse_lines(spec, "keep", n_layer, n_expert, layers)
    if _LIST.fullmatch(spec.strip()):
        return np.tile(parse_row(spec, f"keep '{spec}'", n_expert), (n_layer, 1))
    if os.path.isfile(spec):
        return _parse_file(spec, n_layer, n_expert, layers)
    raise MoeshardError(
        f"keep '{spec}' is neither a list of experts nor a file; write ids from 0 to {n_expert - 1} such as "
        f"'{_example(n_expert)}', or the path of an existing file with a line per layer"
    )


def expert_layers(layout: MoeLayout) -> list[int]:
    """Return the layers of which a file holds experts, ascending."""
    return sorted({tensor.layer for tensor in layout.tensors})


def held_range(keep: Keep, layers: Sequence[int]) -> tuple[int, int]:
    """Return the fewest and the most experts that any of these layers holds."""
    counts = keep[list(layers)].sum(axis=1)
    return int(counts.min()), int(counts.max())


def format_keep(keep: npt.ArrayLike) -> str:
    """Write a keep as the lines that `parse_keep` reads, each with its layer: ``"0: 0-63,70\\n1: all\\n"``.

    Args:
        keep: bool array ``(n_layer, n_expert)``.

    Raises:
        MoeshardError: on another shape or dtype.
    """
    array = np.asarray(keep)
    if array.ndim != 2 or array.dtype != np.bool_:
        raise MoeshardError(f"keep must be a bool array (n_layer, n_expert), got {array.dtype} {array.shape}")
    return "".join(f"{layer}: {format_row(row)}\n" for layer, row in enumerate(array))


def format_row(row: npt.ArrayLike) -> str:
    """Write one layer of a keep (bool array ``(n_expert,)``): ``"0-63,70"``, ``"all"`` or ``"none"``."""
    held = np.flatnonzero(np.asarray(row, dtype=bool))
    if held.size == np.size(row):
        return _ALL[0]
    return format_ids(held) if held.size else _NONE


def format_ids(ids: npt.ArrayLike) -> str:
    """Write ascending ids as ranges: ``"0-63,70"``."""
    array = np.asarray(ids, dtype=np.int64)
    runs = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return ",".join(f"{run[0]}" if run.size == 1 else f"{run[0]}-{run[-1]}" for run in runs if run.size)


def _example(n_expert: int) -> str:
    return f"0-{n_expert // 2 - 1},{n_expert - 1}" if n_expert > 3 else "0"


def parse_row(text: str, where: str, n: int, one: str = "an expert", all_of: str = "experts per layer") -> Keep:
    """A list of experts, or of what else a model has `n` of; `where` begins the message of an error."""
    row = np.zeros(n, dtype=np.bool_)
    tokens = text.replace(",", " ").split()
    if not tokens:
        raise MoeshardError(f"{where}: nothing given; write ids such as '{_example(n)}', 'all' or 'none'")
    for token in tokens:
        if token.lower() in _ALL:
            row[:] = True
            continue
        if token.lower() == _NONE:
            if len(tokens) > 1:
                raise MoeshardError(f"{where}: 'none' stands alone, without others beside it")
            continue
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise MoeshardError(
                f"{where}: '{token}' is not {one}; write ids from 0 to {n - 1} and ranges of them, "
                f"such as '{_example(n)}' (no spaces within a range)"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise MoeshardError(f"{where}: the range '{token}' runs backwards; write '{last}-{first}'")
        if last >= n:
            raise MoeshardError(
                f"{where}: '{token}' is out of range: the model has {n} {all_of}, numbered from 0 to {n - 1}"
            )
        row[first : last + 1] = True
    return row


def _parse_file(path: str, n_layer: int, n_expert: int, moe_layers: list[int]) -> Keep:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise MoeshardError(f"cannot read keep file '{path}': it is not text; expected a line per layer") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no system call takes
        reason = getattr(error, "strerror", None) or error
        raise MoeshardError(f"cannot read keep file '{path}': {reason}") from error
    return _parse_lines(text, path, n_layer, n_expert, moe_layers)


def _parse_lines(text: str, source: str, n_layer: int, n_expert: int, moe_layers: list[int]) -> Keep:
    """Lines of a file or text; `source` stands for it in errors."""
    rows: list[tuple[str | None, Keep, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.split("#", 1)[0]
        if not content.strip():
            continue
        where = f"{source}, line {number}"
        prefix = _PREFIX.fullmatch(content)
        layer = None if prefix is None else prefix[1]
        if rows and (layer is None) != (rows[0][0] is None):
            raise MoeshardError(f"{where}: the 'layer:' prefix must stand on every line or on none")
        rows.append((layer, parse_row(content if prefix is None else prefix[2], where, n_expert), where))
    if rows and rows[0][0] is not None:
        return _by_prefix(rows, source, n_layer, n_expert, moe_layers)
    return _in_order([row for _, row, _ in rows], source, n_layer, n_expert, moe_layers)


def _by_prefix(
    rows: list[tuple[str | None, Keep, str]], source: str, n_layer: int, n_expert: int, moe_layers: list[int]
) -> Keep:
    keep = np.ones((n_layer, n_expert), dtype=np.bool_)
    seen: set[int] = set()
    for prefix, row, where in rows:
        match = _TOKEN.fullmatch(prefix or "")
        if match is None or match[2] is not None or int(match[1]) >= n_layer:
            raise MoeshardError(
                f"{where}: '{prefix}' is not a layer; the model has {n_layer} layers, numbered from 0 to {n_layer - 1}"
            )
        layer = int(match[1])
        if layer in seen:
            raise MoeshardError(f"{where}: layer {layer} was already given; write one line per layer")
        seen.add(layer)
        keep[layer] = row
    missing = [layer for layer in moe_layers if layer not in seen]
    if missing:
        raise MoeshardError(
            f"{source}: no line for layer{'s' if len(missing) > 1 else ''} {_shorten(missing)}; add one for each, "
            f"such as '{missing[0]}: all'"
        )
    return keep


def _in_order(rows: list[Keep], source: str, n_layer: int, n_expert: int, moe_layers: list[int]) -> Keep:
    keep = np.ones((n_layer, n_expert), dtype=np.bool_)
    if len(rows) == n_layer:
        keep[:] = rows
    elif len(rows) == len(moe_layers) > 0:
        keep[moe_layers] = rows
    else:
        dense = f", or {len(moe_layers)} for its MoE layers alone" if len(moe_layers) != n_layer else ""
        hint = "; to hold the same experts in every layer, give the list itself instead of a file"
        raise MoeshardError(
            f"{source}: {len(rows)} line{'' if len(rows) == 1 else 's'} with experts, but the model needs {n_layer}, "
            f"one per layer{dense}{hint if len(rows) == 1 else ''}"
        )
    return keep


def _from_array(spec: Any, n_layer: int, n_expert: int) -> Keep:
    wanted = f"a bool array of shape ({n_layer}, {n_expert}) or ({n_expert},), or integer ids from 0 to {n_expert - 1}"
    try:
        array = np.asarray(sorted(spec) if isinstance(spec, Set) else spec)
    except (TypeError, ValueError) as error:  # ragged lists, sets of mixed things
        raise MoeshardError(f"keep must be {wanted}: {error}") from error
    if array.dtype == np.bool_:
        if array.shape == (n_expert,):
            return np.tile(array, (n_layer, 1))
        if array.shape == (n_layer, n_expert):
            return array.copy()
        raise MoeshardError(
            f"keep has shape {array.shape}, but the model needs ({n_layer}, {n_expert}), one row per layer (dense ones "
            f"too), or ({n_expert},) for every layer"
        )
    if array.size == 0:
        raise MoeshardError(f"keep is empty; give {wanted}")
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1:
        raise MoeshardError(
            f"keep must be {wanted}, got {array.dtype} of shape {array.shape}; if it is a mask, convert it with "
            f".astype(bool)"
        )
    wrong = array[(array < 0) | (array >= n_expert)]
    if wrong.size:
        raise MoeshardError(f"keep holds expert {wrong[0]}, but the model has experts 0 to {n_expert - 1}")
    row = np.zeros(n_expert, dtype=np.bool_)
    row[array] = True
    if np.count_nonzero(row) != array.size:
        raise MoeshardError(
            "keep repeats expert ids; give each once (if it is a mask of zeros and ones, convert it with .astype(bool))"
        )
    return np.tile(row, (n_layer, 1))


def _shorten(layers: list[int], limit: int = 8) -> str:
    shown = ", ".join(map(str, layers[:limit]))
    return shown if len(layers) <= limit else f"{shown} and {len(layers) - limit} more"
