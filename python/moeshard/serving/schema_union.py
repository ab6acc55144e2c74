"""What a JSON schema allows, as alternatives that each say everything themselves: no references, nothing combined."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import unquote

from moeshard._core import MoeshardError

MAX_ALTERNATIVES = 500
_MAX_FOLLOWED = 100
_MAX_STEPS = 20_000

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
KEYWORDS = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
# Each would have to be ignored.
REFUSED = (
    "not", "if", "then", "else", "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas",
    "dependencies", "unevaluatedProperties", "unevaluatedItems", "contains", "minContains", "maxContains",
    "uniqueItems", "multipleOf", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_HARMLESS: dict[str, tuple[Any, ...]] = {"uniqueItems": (False,), "multipleOf": (1,)}

Schema: TypeAlias = "Mapping[str, Any] | bool"
Simple: TypeAlias = "dict[str, Any]"
"""Keywords of one alternative: those of `KEYWORDS`, ``enum`` (a list), and ``type`` (a tuple); ``path`` says where."""


class Impossible(MoeshardError):
    """No value fits."""


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0, but not true."""
    return canonical(a) == canonical(b)


def canonical(value: Any) -> str:
    """Return a text that only equal JSON values have."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def type_of(value: Any) -> str:
    """Return the type of a JSON value; that of 1.0 is integer."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


class Union:
    """The alternatives of a document's schemas."""

    def __init__(self, document: Mapping[str, Any]):
        self._document = document
        self._steps = 0

    def _step(self, n: int = 1) -> None:
        self._steps += n
        if self._steps > _MAX_STEPS:
            raise MoeshardError("it is too large: too many references and combinations")

    def alternatives(self, schema: Schema, path: str, followed: tuple[str, ...] = ()) -> list[Simple]:
        """Return the alternatives of a schema; none where it allows nothing.

        Args:
            schema: it.
            path: where it stands, for errors.
            followed: references that led here.

        Raises:
            MoeshardError: it is wrong, or says what cannot be heeded.
        """
        self._step()
        if isinstance(schema, bool):
            return [{"path": path}] if schema else []
        if not isinstance(schema, Mapping):
            raise MoeshardError(f"{path} must be a schema: an object, true or false")
        found = [_simple(schema, path)]
        if schema.get("nullable") is True and "type" in found[0]:  # OpenAPI 3.0
            found[0]["type"] = (*found[0]["type"], "null")
        for step, others in self._combined(schema, path, followed):
            self._step(len(found) * len(others))
            found = [both for one in found for other in others if (both := _merged(one, other, step)) is not None]
            if len(found) > MAX_ALTERNATIVES:
                raise MoeshardError(f"{path} has more than {MAX_ALTERNATIVES} alternatives")
        return found

    def _combined(
        self, schema: Mapping[str, Any], path: str, followed: tuple[str, ...]
    ) -> Iterator[tuple[str, list[Simple]]]:
        """Yield what has to hold beside a schema's own keywords."""
        if "$ref" in schema:
            ref = schema["$ref"]
            if ref in followed or len(followed) > _MAX_FOLLOWED:
                raise MoeshardError(f"{path}/$ref: '{ref}' refers to itself")
            yield f"{path}/$ref", self.alternatives(self._target(ref, path), ref, (*followed, ref))
        for index, part in enumerate(_schemas(schema, "allOf", path)):
            step = f"{path}/allOf/{index}"
            yield step, self.alternatives(part, step, followed)
        for name in ("anyOf", "oneOf"):
            members = [
                self.alternatives(part, f"{path}/{name}/{index}", followed)
                for index, part in enumerate(_schemas(schema, name, path))
            ]
            if name == "oneOf":
                self._check_apart(members, f"{path}/oneOf")
            if name in schema:
                yield f"{path}/{name}", [one for member in members for one in member]

    def _target(self, ref: Any, path: str) -> Schema:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise MoeshardError(f"{path}/$ref: only references within the schema ('#/$defs/name') are followed")
        found: Any = self._document
        for step in ref.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdigit() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                raise MoeshardError(f"{path}/$ref: there is no '{ref[:200]}'")
        return found  # type: ignore[no-any-return]

    def _check_apart(self, members: Sequence[Sequence[Simple]], path: str) -> None:
        """Refuse members of oneOf that one value may fit two of, as far as can be told."""
        if sum(len(member) for member in members) > 100:
            raise MoeshardError(f"{path} has more than 100 alternatives (anyOf can have more)")
        for index, member in enumerate(members):
            for other, second in enumerate(members[:index]):
                if not all(self._apart(one, two, 0) and self._apart(two, one, 0) for one in member for two in second):
                    raise MoeshardError(
                        f"{path}: a value may fit both {other} and {index}; make them differ in type or in a required "
                        "property with const, or write anyOf"
                    )

    def _apart(self, written: Simple, other: Simple, depth: int) -> bool:
        """Whether no value that is written for one alternative fits another."""
        self._step()
        mine, theirs = types_written(written), other.get("type", TYPES)
        if not _intersected(mine, theirs):
            return True
        if "enum" in written and "enum" in other:
            return not any(same(one, two) for one in written["enum"] for two in other["enum"])
        if "enum" in written or mine != ("object",) or depth > 5:
            return False
        names, other_names = written.get("properties", {}), other.get("properties", {})
        for name in written.get("required", ()):
            if name not in other_names:
                if other.get("additionalProperties") is False:
                    return True
                continue
            if name in names:
                one = self.alternatives(names[name], f"{written['path']}/properties/{name}")
                two = self.alternatives(other_names[name], f"{other['path']}/properties/{name}")
                if all(self._apart(a, b, depth + 1) for a in one for b in two):
                    return True
        closed = written.get("additionalProperties", not names) is False
        return closed and any(name not in names for name in other.get("required", ()))


def types_written(simple: Simple) -> tuple[str, ...]:
    """Return the types of the values that are written for an alternative.

    Where a schema does not name any, but has keywords of some types, it means these.
    """
    if "enum" in simple:
        return tuple(dict.fromkeys(type_of(value) for value in simple["enum"]))
    if "type" in simple:
        return tuple(simple["type"])
    meant = tuple(kind for kind, names in KEYWORDS.items() if any(name in simple for name in names))
    return meant or TYPES


def _schemas(schema: Mapping[str, Any], name: str, path: str) -> Sequence[Schema]:
    value = schema.get(name, [])
    if name in schema and (not isinstance(value, list) or not value):
        raise MoeshardError(f"{path}/{name} must be an array of schemas")
    return value  # type: ignore[no-any-return]


def _simple(schema: Mapping[str, Any], path: str) -> Simple:
    """Return a schema's own keywords, checked."""
    for name in REFUSED:
        if name in schema and schema[name] not in _HARMLESS.get(name, ()):
            raise MoeshardError(f"{path}/{name}: '{name}' is not supported here")
    found: Simple = {"path": path}
    for names in KEYWORDS.values():
        found |= {name: schema[name] for name in names if name in schema}
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not isinstance(kinds, list) or not kinds or any(kind not in TYPES for kind in kinds):
            raise MoeshardError(f"{path}/type must be one or more of {', '.join(TYPES)}")
        found["type"] = tuple(dict.fromkeys(kinds))
    if isinstance(found.get("items"), list):  # as drafts before 2020 have it
        found["prefixItems"] = found.pop("items")
        if "additionalItems" in schema:
            found["items"] = schema["additionalItems"]
    _check_values(found, path)
    values = schema.get("enum")
    if "enum" in schema and (not isinstance(values, list) or not values):
        raise MoeshardError(f"{path}/enum must be an array of values")
    if "const" in schema:
        values = [value for value in values or [schema["const"]] if same(value, schema["const"])]
    if values is not None:
        found["enum"] = values
    # OpenAPI and drafts before 6 have flags here.
    for end, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(found.get(flag), bool) and found.pop(flag) and end in found:
            found[flag] = found.pop(end)
    return found


def _check_values(found: Simple, path: str) -> None:
    def wants(name: str, what: str, fits: Callable[[Any], bool]) -> None:
        if name in found and not fits(found[name]):
            raise MoeshardError(f"{path}/{name} must be {what}")

    for name in _COUNTS:
        wants(name, "a whole number, 0 or more", lambda value: type_of(value) == "integer" and value >= 0)
        if name in found:
            found[name] = int(found[name])
    for name in ("minimum", "maximum"):
        wants(name, "a number", lambda value: type_of(value) in ("integer", "number"))
        wants(f"exclusive{name.title()}", "a number", lambda value: type_of(value) in ("integer", "number", "boolean"))
    for name in ("pattern", "format"):
        wants(name, "a string", lambda value: isinstance(value, str))
    wants("properties", "an object", lambda value: isinstance(value, Mapping))
    wants("prefixItems", "an array", lambda value: isinstance(value, list))
    wants(
        "required",
        "an array of strings",
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    )


def _intersected(a: Sequence[str], b: Sequence[str]) -> tuple[str, ...]:
    """Return the types in both; a whole number is a number too."""
    found = [kind for kind in a if kind in b or (kind == "integer" and "number" in b)]
    if "number" in a and "integer" in b:
        found.append("integer")
    return tuple(dict.fromkeys(found))


def _merged(a: Simple, b: Simple, path: str) -> Simple | None:
    """Return what both alternatives say together, None where no value fits both."""
    found = {**a, **{name: b[name] for name in b if name not in a and name != "path"}}
    if "type" in a and "type" in b:
        found["type"] = _intersected(a["type"], b["type"])
        if not found["type"]:
            return None
    if "enum" in a and "enum" in b:
        found["enum"] = [value for value in a["enum"] if any(same(value, other) for other in b["enum"])]
        if not found["enum"]:
            return None
    for name in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
        if name in a and name in b:
            found[name] = max(a[name], b[name])
    for name in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
        if name in a and name in b:
            found[name] = min(a[name], b[name])
    for name in ("pattern", "format"):
        if name in a and name in b and a[name] != b[name]:
            raise MoeshardError(f"{path}: two different values of '{name}' cannot be heeded together")
    if "required" in a and "required" in b:
        found["required"] = list(dict.fromkeys([*a["required"], *b["required"]]))
    if any(name in one for one in (a, b) for name in KEYWORDS["object"]):
        _merge_properties(a, b, found)
    if any(name in one for one in (a, b) for name in KEYWORDS["array"]):
        _merge_items(a, b, found)
    return found


def _both(a: Schema | None, b: Schema | None) -> Schema:
    """Return the schema of what fits two; None is what fits anything."""
    if a is False or b is False:
        return False
    parts = [part for part in (a, b) if part is not None and part is not True]
    if len(parts) == 2 and canonical(parts[0]) == canonical(parts[1]):
        parts.pop()
    return {"allOf": parts} if len(parts) == 2 else parts[0] if parts else True


def _merge_properties(a: Simple, b: Simple, found: Simple) -> None:
    mine, theirs = a.get("properties", {}), b.get("properties", {})
    names = dict.fromkeys([*mine, *theirs])
    rest_mine, rest_theirs = a.get("additionalProperties"), b.get("additionalProperties")
    if names:
        found["properties"] = {name: _both(mine.get(name, rest_mine), theirs.get(name, rest_theirs)) for name in names}
    if rest_mine is not None or rest_theirs is not None:
        found["additionalProperties"] = _both(rest_mine, rest_theirs)


def _merge_items(a: Simple, b: Simple, found: Simple) -> None:
    mine, theirs = a.get("prefixItems", []), b.get("prefixItems", [])
    rest_mine, rest_theirs = a.get("items"), b.get("items")
    n = max(len(mine), len(theirs))
    if n:
        found["prefixItems"] = [
            _both(
                mine[at] if at < len(mine) else rest_mine,
                theirs[at] if at < len(theirs) else rest_theirs,
            )
            for at in range(n)
        ]
    if rest_mine is not None or rest_theirs is not None:
        found["items"] = _both(rest_mine, rest_theirs)
