"""JSON schema to the grammar that an answer has to follow (GBNF, as llama.cpp reads it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeshard._core import MoeshardError

# Between two tokens of JSON a model may write a line break and some spaces, but not without end.
_JSON_OBJECT = r"""
root   ::= object
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws ( string ":" ws value ( "," ws string ":" ws value )* )? "}" ws
array  ::= "[" ws ( value ( "," ws value )* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" ( ["\\bfnrt/] | "u" [0-9a-fA-F]{4} ) )* "\"" ws
number ::= "-"? ( "0" | [1-9] [0-9]{0,15} ) ( "." [0-9]{1,16} )? ( [eE] [-+]? [0-9]{1,3} )? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of the JSON values that a schema allows.

    Raises:
        MoeshardError: the schema says more than that the value is an object, which is all that is understood so far.
    """
    if dict(schema) == {"type": "object"}:
        return _JSON_OBJECT
    raise MoeshardError('only {"type": "object"} is supported yet; use response_format json_object, or a grammar')
