"""The type stubs say what the compiled module has: the same names, the same parameters, the same defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

from moeshard import _core

STUB = Path(__file__).parents[2] / "python" / "moeshard" / "_core.pyi"
# pybind11 writes a signature into the first line of every docstring.
SIGNATURE = re.compile(r"^\w+\((?P<parameters>.*)\) -> ")
# What a class registered as a Mapping has, and its stub inherits.
MAPPING = {"get", "items", "keys", "values"}

# Names and stars in order, each with its default or the word "required".
Parameters = list[tuple[str, object]]


def value(default: ast.expr) -> object:
    literal = ast.literal_eval(default)
    # The module holds some as 32-bit numbers, and prints all their digits.
    return float(f"{literal:.6g}") if isinstance(literal, float) else literal


def stub_parameters(function: ast.FunctionDef) -> Parameters:
    args = function.args
    first_default = len(args.args) - len(args.defaults)
    out: Parameters = []
    for i, arg in enumerate(args.args):
        out.append((arg.arg, value(args.defaults[i - first_default]) if i >= first_default else "required"))
    if args.kwonlyargs:
        out.append(("*", "required"))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        out.append((arg.arg, "required" if default is None else value(default)))
    return out


def split(text: str) -> list[str]:
    """Split at the commas that are in no brackets: annotations hold anything."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def native_parameters(function: object) -> Parameters:
    match = SIGNATURE.match(function.__doc__ or "")
    assert match, f"{function!r} has no signature"
    out: Parameters = []
    for part in split(match["parameters"]):
        name, default = re.split(r"[:=]", part, maxsplit=1)[0].strip(), re.search(r" = (.+)$", part)
        out.append((name, value(ast.parse(default[1], mode="eval").body) if default else "required"))
    return out


def public(owner: type | ModuleType) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


BODY = ast.parse(STUB.read_text()).body
CLASSES = {node.name: node for node in BODY if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in BODY if isinstance(node, ast.FunctionDef)}


def test_same_names() -> None:
    assert CLASSES.keys() | FUNCTIONS.keys() == public(_core)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_same_function(name: str) -> None:
    assert stub_parameters(FUNCTIONS[name]) == native_parameters(getattr(_core, name))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_same_class(name: str) -> None:
    node, native = CLASSES[name], getattr(_core, name)
    members = {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}
    inherited = MAPPING if any("Mapping" in ast.unparse(base) for base in node.bases) else set()
    assert {member for member in members if not member.startswith("_")} | inherited == public(native)
    for member, stub in members.items():
        is_property = "property" in map(ast.unparse, stub.decorator_list)
        assert isinstance(vars(native)[member], property) == is_property, member
        if member == "__init__" or not (is_property or member.startswith("__")):
            assert stub_parameters(stub) == native_parameters(getattr(native, member)), member
