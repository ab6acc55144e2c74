"""Reading JSON files that people may have edited: what is wrong is said with its place in the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

from moeshard._core import MoeshardError

_S = TypeVar("_S")
_T = TypeVar("_T")
_WORDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_document(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a file that holds one JSON object; `what` stands for it in errors, such as ``plan``.

    Raises:
        MoeshardError: the file cannot be read, or is no JSON object; a key stands twice, or a number is not finite.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MoeshardError(f"cannot read {what} '{name}': it is not text; expected JSON in UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no system call takes
        raise MoeshardError(f"cannot read {what} '{name}': {getattr(error, 'strerror', None) or error}") from error
    try:
        return parse_document(text, what)
    except MoeshardError as error:
        raise MoeshardError(f"{what} '{name}': {error}") from error


def parse_named(path: str | os.PathLike[str], what: str, content: _S, parse: Callable[[_S], _T]) -> _T:
    """Return what `parse` makes of the content of a file; its errors then name the file."""
    try:
        return parse(content)
    except MoeshardError as error:
        raise MoeshardError(f"{what} '{os.fspath(path)}': {error}") from error


def write_document(document: dict[str, Any], what: str) -> str:
    """Return the text of a document, to be read by `read_document`.

    Raises:
        MoeshardError: it holds something that JSON has no word for, such as NaN.
    """
    try:
        return json.dumps(document, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise MoeshardError(f"cannot write the {what} as JSON: {error}; use plain values in it") from error


def check_version(document: dict[str, Any], key: str, version: int, what: str, *, oldest: int | None = None) -> int:
    """Return the version that a document says by `key` that it is of: this one, or an older one from `oldest` on.

    Raises MoeshardError where it says no such version.
    """
    if key not in document:
        raise MoeshardError(f'it is no {what}: the key "{key}" is missing (for this version, with the value {version})')
    found = take(document, key, int)
    if not (version if oldest is None else oldest) <= found <= version:
        raise MoeshardError(
            f"{key}: it is of version {found}, but this moeshard reads version {version}; "
            + ("update moeshard" if found > version else "make the file again")
        )
    return found


def take(source: dict[str, Any], key: str, kind: type[_T], parent: str = "") -> _T:
    """Return a value of an object, or say that it is missing or of another type; `parent` is the object's place."""
    place = f"{parent}.{key}" if parent else key
    if key not in source:
        raise MoeshardError(f"{place}: is missing; expected {_WORDS[kind]}")
    return expect(source[key], kind, place)


def expect(value: object, kind: type[_T], place: str) -> _T:
    """Return the value if it is of this type. An integer is a number too."""
    # Python counts true and false among the integers.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # type: ignore[return-value]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MoeshardError(f"{place}: expected {_WORDS[kind]}, got {_WORDS[type(value)]}")
    return value


def parse_document(text: str, what: str) -> dict[str, Any]:
    """Parse JSON into an object, without what Python takes beyond JSON or would pass over.

    Raises:
        MoeshardError: as `read_document`, without the file's name.
    """

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise MoeshardError(f"it holds the number {number}; numbers must be finite")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise MoeshardError(f"the key '{key}' stands twice in the same object")
            result[key] = value
        return result

    try:
        document = json.loads(text, parse_float=finite, parse_constant=finite, object_pairs_hook=once)
    except RecursionError as error:
        raise MoeshardError(f"it is nested deeper than any {what}") from error
    except ValueError as error:
        raise MoeshardError(f"it is not JSON, or damaged: {error}") from error
    return expect(document, dict, "the file")


def check_other(other: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raise a `MoeshardError` where `other`, which is written beside the keys of a schema, holds one of them."""
    for key in other:
        if key in keys:
            raise MoeshardError(f"{where}: '{key}' has its own place in the file; set it there")


def other_keys(source: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return what an object holds beyond the keys of its schema."""
    return {key: value for key, value in source.items() if key not in keys}
