"""JSON schema to the grammar that an answer has to follow (GBNF, as llama.cpp reads it).

A grammar needs no other library, and the sampler of the engine follows it without asking Python for each token. What a
schema says and a grammar cannot is refused, not ignored; what an answer can be is then valid by the schema, though not
every valid value can be written: properties come in the order of the schema, and others only where they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from typing import Any

from moeshard._core import MoeshardError
from moeshard.serving.grammar import EMPTY, NOTHING, Grammar, either, literal
from moeshard.serving.grammar_keys import other_keys
from moeshard.serving.grammar_numbers import INTEGER, NUMBER, Bound, number_between
from moeshard.serving.grammar_texts import CHARACTER, FORMATS, text_of_length, text_of_pattern
from moeshard.serving.schema_union import (
    KEYWORDS,
    TYPES,
    Impossible,
    Schema,
    Simple,
    Union,
    canonical,
    type_of,
    types_written,
)

MAX_DEPTH = 64
MAX_SIZE = 256 * 1024

# Between two tokens of JSON a model may write a line break and some spaces, but not without end.
_RULES = rf"""
ws     ::= | " " | "\n" [ \t]{{0,20}}
char   ::= {CHARACTER}
string ::= "\"" char* "\""
number ::= {NUMBER}
value  ::= object | array | string | number | "true" | "false" | "null"
pair   ::= string ":" ws value
object ::= "{{" ws ( pair ( "," ws pair )* ws )? "}}"
array  ::= "[" ws ( value ( "," ws value )* ws )? "]"
"""


def schema_grammar(schema: Schema) -> str:
    """Return the grammar of the JSON values that a schema allows.

    Raises:
        MoeshardError: the schema is wrong, allows nothing, is too large, or says what no grammar can; where and why.
    """
    try:
        text = json.dumps(schema)
        if len(text) > MAX_SIZE:
            raise MoeshardError(f"it is larger than {MAX_SIZE // 1024} KiB")
        return _written(text)
    except RecursionError as error:
        raise MoeshardError("it is nested too deeply") from error


@lru_cache(maxsize=64)  # who asks with a schema asks with it again
def _written(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, Mapping):
        raise MoeshardError("it must be an object")
    writer = _Writer(schema)
    root = writer.value(schema, "#")
    return writer.grammar.text(root) + _RULES


class _Writer:
    def __init__(self, document: Mapping[str, Any]):
        self.grammar = Grammar()
        self._union = Union(document)
        self._names: dict[str, str] = {}
        self._depth = 0
        self._why = ""
        """What made a value impossible last."""

    def value(self, schema: Schema, path: str) -> str:
        """Return the rule of the values of a schema.

        Raises:
            Impossible: there are none.
        """
        key = canonical(schema)
        if key in self._names:
            return self._names[key]
        if self._depth == MAX_DEPTH:
            raise MoeshardError(f"{path} is nested more than {MAX_DEPTH} deep")
        name = self._names[key] = self.grammar.reserve()  # it may be part of itself
        self._depth += 1
        self._why = ""
        found = [kind for simple in self._union.alternatives(schema, path) for kind in self._kinds(simple)]
        self._depth -= 1
        if not found:
            del self._names[key]
            self.grammar.define(name, NOTHING)
            raise Impossible(f"{path} allows no value{self._why}")
        self.grammar.define(name, either(found))
        return name

    def _kinds(self, simple: Simple) -> list[str]:
        """Return the expressions of an alternative, one for each type."""
        if "enum" in simple:
            return self._constants(simple)
        types = types_written(simple)
        if set(types) == set(TYPES) and not any(name in simple for names in KEYWORDS.values() for name in names):
            return ["value"]
        if "number" in types:
            types = tuple(kind for kind in types if kind != "integer")
        found = []
        for kind in types:
            try:
                found.append(self._of_type(kind, simple))
            except Impossible as error:
                self._why = f": {error}"
        return found

    def _constants(self, simple: Simple) -> list[str]:
        types = simple.get("type", TYPES)
        values = [
            value
            for value in simple["enum"]
            if type_of(value) in types or (type_of(value) == "integer" and "number" in types)
        ]
        for value in values:
            kind = "number" if type_of(value) == "integer" else type_of(value)
            for name in KEYWORDS.get(kind, ()):
                if name in simple:
                    raise MoeshardError(f"{simple['path']}/{name}: beside enum or const it cannot be heeded")
        return [_constant(value) for value in values]

    def _of_type(self, kind: str, simple: Simple) -> str:
        if kind == "object":
            return self._object(simple)
        if kind == "array":
            return self._array(simple)
        if kind == "string":
            return self._string(simple)
        if kind in ("number", "integer"):
            return self._number(simple, kind == "integer")
        return '"null"' if kind == "null" else '( "true" | "false" )'

    def _string(self, simple: Simple) -> str:
        path, low, high = simple["path"], simple.get("minLength", 0), simple.get("maxLength")
        _check_range(path, low, high, "Length")
        pattern, format_ = simple.get("pattern"), simple.get("format")
        if format_ is not None and format_ not in FORMATS:
            raise MoeshardError(f"{path}/format: '{format_[:100]}' is not supported here; {', '.join(FORMATS)} are")
        if pattern is not None and format_ is not None:
            raise MoeshardError(f"{path}: pattern and format cannot be heeded together")
        if format_ is not None:
            pattern = FORMATS[format_]
        if pattern is None:
            return text_of_length(self.grammar, low, high) if low or high is not None else "string"
        named = "pattern" if format_ is None else "format"
        try:
            return text_of_pattern(self.grammar, pattern, low, high)
        except MoeshardError as error:
            raise MoeshardError(f"{path}/{named}: {error}") from error

    def _number(self, simple: Simple, whole: bool) -> str:
        low = _bound(simple, "minimum", max)
        high = _bound(simple, "maximum", min)
        if low is None and high is None:
            return INTEGER if whole else "number"
        try:
            found = number_between(self.grammar, low, high, whole=whole)
        except MoeshardError as error:
            raise MoeshardError(f"{simple['path']}: {error}") from error
        if found is None:
            raise Impossible(f"{simple['path']}: no number lies between its bounds")
        return found

    def _array(self, simple: Simple) -> str:
        path, low, high = simple["path"], simple.get("minItems", 0), simple.get("maxItems")
        _check_range(path, low, high, "Items")
        first, rest = self._items(simple)
        first = first[:high]
        if rest is None and low > len(first):
            raise Impossible(f"{path} allows fewer items than minItems")
        n_more = 0 if rest is None else None if high is None else high - len(first)
        if n_more == 0 and not first:
            return '"[" ws "]"'
        more = "" if rest is None else self.grammar.rule(f'"," ws {rest}')
        if not first:
            others = self.grammar.repeat(more, max(low - 1, 0), None if n_more is None else n_more - 1)
            return f'"[" ws {rest} {others} ws "]"' if low else f'"[" ws ( {rest} {others} ws )? "]"'
        # From behind: what follows the items before, each of which may be the last one.
        tail = self.grammar.repeat(more, max(low - len(first), 0), n_more)
        for at in range(len(first) - 1, 0, -1):
            body = f'"," ws {first[at]} {tail}'
            tail = self.grammar.rule(body if at < low else f"( {body} )?")
        return f'"[" ws {first[0]} {tail} ws "]"' if low else f'"[" ws ( {first[0]} {tail} ws )? "]"'

    def _items(self, simple: Simple) -> tuple[list[str], str | None]:
        """Return the rules of the first items, and that of further ones; None: there can be none."""
        path, first = simple["path"], []
        for index, item in enumerate(simple.get("prefixItems", ())):
            try:
                first.append(self.value(item, f"{path}/prefixItems/{index}"))
            except Impossible:
                return first, None
        try:
            return first, self.value(simple.get("items", not first), f"{path}/items")
        except Impossible:
            return first, None

    def _object(self, simple: Simple) -> str:
        path, names = simple["path"], dict(simple.get("properties", {}))
        required = set(simple.get("required", ()))
        # Others are written only where a schema allows them in words, or names none.
        others: Schema = simple.get("additionalProperties", not names)
        rest = None
        for name in simple.get("required", ()):
            names.setdefault(name, simple.get("additionalProperties", True))
        pairs = []
        for name, schema in names.items():
            try:
                rule = self.value(schema, f"{path}/properties/{name}")
            except Impossible:
                if name in required:
                    raise
                continue
            pairs.append((self.grammar.rule(f'{literal(_json(name))} ":" ws {rule}'), name in required))
        with suppress(Impossible):
            value = self.value(others, f"{path}/additionalProperties")
            rest = self.grammar.rule(f'{other_keys(self.grammar, list(names))} ":" ws {value}')
        return self._members(simple, pairs, rest)

    def _members(self, simple: Simple, pairs: Sequence[tuple[str, bool]], rest: str | None) -> str:
        """Return the expression of an object with these pairs, in this order, and further ones."""
        path, low, high = simple["path"], simple.get("minProperties", 0), simple.get("maxProperties")
        _check_range(path, low, high, "Properties")
        if low > sum(needed for _, needed in pairs) and not (low == 1 and not pairs):
            raise MoeshardError(f"{path}/minProperties: more than are required cannot be heeded")
        n_more = None
        if high is not None and (high < len(pairs) or rest is not None):
            n_more = high - len(pairs)
            if n_more < 0:
                raise MoeshardError(f"{path}/maxProperties: fewer than the properties cannot be heeded")
        # From behind, what may follow where a pair came already, and where none did.
        later, first = "", ""
        if rest is not None and n_more != 0:
            more = self.grammar.rule(f'"," ws {rest}')
            later = self.grammar.rule(self.grammar.repeat(more, 0, n_more))
            first = f"{rest} {self.grammar.repeat(more, 0, None if n_more is None else n_more - 1)} ws"
            first = self.grammar.rule(first if low and not pairs else f"( {first} )?")
        for pair, needed in reversed(pairs):
            begin = f"{pair} {later} ws"
            first = self.grammar.rule(begin if needed else f"{begin} | {first or EMPTY}")
            later = self.grammar.rule(f'"," ws {pair} {later}' if needed else f'( "," ws {pair} )? {later}')
        return f'"{{" ws {first} "}}"'


def _bound(simple: Simple, name: str, tighter: Any) -> Bound | None:
    found = []
    for key, is_in in ((name, True), (f"exclusive{name.title()}", False)):
        if key in simple:
            found.append(Bound(Decimal(str(simple[key])), is_in))
    if not found:
        return None
    value = tighter(bound.value for bound in found)
    return Bound(value, all(bound.is_in for bound in found if bound.value == value))


def _check_range(path: str, low: int, high: int | None, what: str) -> None:
    if high is not None and high < low:
        raise Impossible(f"{path}/max{what} is less than min{what}")


def _constant(value: Any) -> str:
    """Return the expression of one value."""
    if isinstance(value, list):
        inner = ' "," ws '.join(_constant(item) for item in value)
    elif isinstance(value, dict):
        inner = ' "," ws '.join(f'{literal(_json(name))} ":" ws {_constant(item)}' for name, item in value.items())
    else:
        return literal(_json(value))
    begin, end = "[]" if isinstance(value, list) else "{}"
    return f'"{begin}" ws {inner} ws "{end}"' if value else f'"{begin}" ws "{end}"'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
