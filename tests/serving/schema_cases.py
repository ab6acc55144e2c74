"""JSON schemas, with values that fit them and values that do not."""

from __future__ import annotations

from typing import Any

NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "bark": {"type": "boolean"}}, "required": ["kind"]}

# Name, schema, valid values that can be written, and invalid ones.
CASES: list[tuple[str, dict[str, Any], list[Any], list[Any]]] = [
    ("anything", {}, [1, "a", None, {"a": [1.5]}, []], []),
    ("object", {"type": "object"}, [{}, {"a": 1, "b": {}}], [[], 1]),
    (
        "properties",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "null"}},
            "required": ["b"],
            "additionalProperties": False,
        },
        [{"b": ""}, {"a": 1, "b": "x"}, {"a": 1, "b": "x", "c": None}, {"b": "", "c": None}],
        [{}, {"a": 1}, {"b": "", "d": 1}, {"a": "1", "b": ""}, {"a": 1.5, "b": ""}],
    ),
    (
        "optional only",
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        [{}, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
        [{"a": None}],
    ),
    (
        "additional",
        {
            "properties": {"ab": {"type": "integer"}, "ac": {"type": "integer"}},
            "additionalProperties": {"type": "string"},
        },
        [{}, {"ab": 1}, {"a": "x"}, {"ab": 1, "abc": "x", "": "y"}, {"ac": 2, "ä": "x"}],
        [{"ab": "x"}, {"a": 1}, {"ac": 1, "ab": "x"}],
    ),
    (
        "counts of properties",
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True, "maxProperties": 2},
        [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1, "b": 1, "c": 1}],
    ),
    ("at least one", {"type": "object", "minProperties": 1}, [{"a": 1}, {"a": 1, "b": 2}], [{}]),
    ("required alone", {"type": "object", "required": ["x"]}, [{"x": 1}, {"x": 1, "y": 2}], [{}, {"y": 1}]),
    ("array", {"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["a"], [1, None]]),
    (
        "items",
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        [[True, False], [True, True, True]],
        [[], [True], [True, True, True, True], [True, 1]],
    ),
    ("one item", {"type": "array", "items": {"type": "null"}, "maxItems": 1}, [[], [None]], [[None, None]]),
    ("no item", {"type": "array", "maxItems": 0}, [[]], [[1]]),
    (
        "tuple",
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 1},
        [["a"], ["a", 1]],
        [[], [1], ["a", "b"], ["a", 1, 2]],
    ),
    (
        "tuple and more",
        {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}, "minItems": 3, "maxItems": 4},
        [["a", 1, 2], ["a", 1, 2, 3]],
        [["a"], ["a", 1], ["a", 1, 2, 3, 4], ["a", 1, "b"]],
    ),
    (
        "old tuple",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [{"const": 1}],
            "additionalItems": {"const": 2},
        },
        [[], [1], [1, 2, 2]],
        [[2]],
    ),
    ("string", {"type": "string"}, ["", "a", 'q"\\\n\t', "äöü€", "\u0001"], [1, None]),
    ("length", {"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "äöü€", '\\"\n'], ["a", "abcde"]),
    (
        "long",
        {"type": "string", "minLength": 150, "maxLength": 420},
        ["a" * n for n in (150, 299, 420)],
        ["a" * 149, "a" * 421],
    ),
    ("enum", {"enum": ["a", 1, None, True, [1, {"b": 2.5}]]}, ["a", 1, None, True, [1, {"b": 2.5}]], ["b", False, 2]),
    ("enum of a type", {"type": "string", "enum": ["a", "b", 1]}, ["a", "b"], [1, "c"]),
    ("const", {"const": {"a": ["\u2028", '"']}}, [{"a": ["\u2028", '"']}], [{"a": []}, {}]),
    ("types", {"type": ["integer", "null"]}, [1, -3, None], ["1", 1.5]),
    ("nullable", {"type": "integer", "nullable": True}, [1, None], ["1"]),
    ("boolean", {"type": "boolean"}, [True, False], [None, 0]),
    ("number", {"type": "number"}, [0, -1, 1.5, 1e10, -2.5e-3], ["1", None]),
    ("integer", {"type": "integer"}, [0, -1, 1234567890123456], [1.5, "1"]),
    ("from", {"type": "integer", "minimum": 7}, [7, 8, 10, 99, 1000], [6, 0, -8]),
    ("to", {"type": "integer", "maximum": 12}, [12, 11, 9, 0, -1, -1000], [13, 20, 100]),
    (
        "between",
        {"type": "integer", "minimum": 98, "maximum": 1203},
        [98, 99, 100, 999, 1000, 1203],
        [97, 1204, 10, -99],
    ),
    ("negative", {"type": "integer", "minimum": -120, "maximum": -7}, [-7, -120, -50, -100], [-6, -121, 0, 7, 100]),
    ("around zero", {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3}, [-2, -1, 0, 1, 2], [-3, 3, 10]),
    ("share", {"type": "number", "minimum": 0, "maximum": 1}, [0, 1, 0.5, 0.001, 0.999], [1.1, -0.1, 2, 1.0001]),
    (
        "open share",
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        [0.5, 0.01, 0.99],
        [0, 1, -0.5, 1.5],
    ),
    (
        "decimals",
        {"type": "number", "minimum": -1.25, "maximum": 10.5},
        [-1.25, -1.2, 0, 10.5, 10.49, 9.99],
        [-1.26, 10.51, 11, -2],
    ),
    ("large", {"type": "integer", "minimum": 0, "maximum": 2**63}, [0, 2**63, 10**18], [2**63 + 1, -1]),
    (
        "pattern",
        {"type": "string", "pattern": "^[A-Z]{2}-\\d+(\\.\\d{1,2})?$"},
        ["AB-1", "XY-12.34"],
        ["A-1", "AB-", "AB-1.234"],
    ),
    ("found anywhere", {"type": "string", "pattern": "ab+c"}, ["abc", "xxabbcyy"], ["ac", "ab"]),
    ("anchored by branch", {"type": "string", "pattern": "^a|b$"}, ["a", "axx", "xxb"], ["xa", "bx"]),
    ("escapes in it", {"type": "string", "pattern": '^["\\\\\\n\u00e4]+$'}, ['"', "\\", "\n", 'ä"\\\n'], ["a", ""]),
    ("groups", {"type": "string", "pattern": "^(?:(a|bc)*|(?<n>x?y?)*z)$"}, ["", "abca", "z", "xyyxz"], ["b", "zx"]),
    ("not in a class", {"type": "string", "pattern": "^[^a-z\\]]{1,3}$"}, ["A", "Ä9", '"'], ["a", "]", "ABCD"]),
    (
        "pattern and length",
        {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3},
        ["ab", "abc"],
        ["a", "abcd"],
    ),
    (
        "date",
        {"type": "string", "format": "date"},
        ["2026-11-25", "2024-02-29", "1999-12-31"],
        ["2023-02-29", "2026-13-01", "2026-04-31"],
    ),
    ("time", {"type": "string", "format": "time"}, ["12:34:56Z", "00:00:00.5+02:00"], ["24:00:00Z", "12:34"]),
    ("date-time", {"type": "string", "format": "date-time"}, ["2026-11-25T17:00:00Z"], ["2026-11-25"]),
    ("uuid", {"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ("ipv4", {"type": "string", "format": "ipv4"}, ["127.0.0.1", "255.255.255.255"], ["256.0.0.1", "1.2.3"]),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, [1, "a", ""], ["ab", None]),
    (
        "oneOf",
        {"oneOf": [CAT, DOG]},
        [{"kind": "cat", "lives": 9}, {"kind": "dog"}],
        [{"kind": "cow"}, {"kind": "dog", "bark": 9}],
    ),
    (
        "allOf",
        {"allOf": [CAT, {"required": ["lives"], "properties": {"lives": {"maximum": 9}}}]},
        [{"kind": "cat", "lives": 9}],
        [{"kind": "cat"}, {"kind": "cat", "lives": 10}],
    ),
    (
        "base and anyOf",
        {
            "type": "object",
            "properties": {"a": {"const": 1}, "b": {"const": 2}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
        [{}],
    ),
    (
        "ref",
        {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n", "maximum": 5}},
        [[], [5, 1]],
        [[6], ["a"]],
    ),
    (
        "recursion",
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        [{"v": 1}, {"v": 1, "next": {"v": 2, "next": {"v": 3}}}],
        [{"v": 1, "next": {}}, {}],
    ),
    ("recursion to the root", {"type": "array", "items": {"$ref": "#"}}, [[], [[], [[]]]], [[1]]),
]
