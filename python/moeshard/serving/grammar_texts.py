"""Strings of JSON as a grammar: of some length, of a pattern, of a format."""

from __future__ import annotations

from moeshard._core import MoeshardError
from moeshard.serving.grammar import EMPTY, Grammar, characters, either, literal
from moeshard.serving.regex import Chain, Chars, Choice, Node, Repeat, complement, lengths, parse

# One character of a string. Half of a surrogate pair is none.
CHARACTER = (
    r'[^"\\\x7F\x00-\x1F] | "\\" ( ["\\bfnrt/] | "u" ( [0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2} ) )'
)
_MAX_STATES = 1000
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 0x22: '"', 0x5C: "\\"}
_RAW = complement([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F)])

_YEAR = "[1-9][0-9]{3}"
_DAYS = "(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31"
_DATE = f"({_YEAR}-({_DAYS})|[1-9][0-9](0[48]|[2468][048]|[13579][26])-02-29)"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_HEX = "[0-9a-f]"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[a-z]([a-z0-9-]{0,30}[a-z0-9])?"
FORMATS = {
    "date": f"^{_DATE}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": "^P([0-9]{1,4}D|[0-9]{1,4}W|([0-9]{1,4}D)?T([0-9]{1,4}H)?([0-9]{1,4}M)?[0-9]{1,4}S)$",
    "email": rf"^[a-z0-9]([a-z0-9._+-]{{0,30}}[a-z0-9])?@{_LABEL}(\.{_LABEL}){{1,3}}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL}){{0,3}}$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "ipv6": f"^({_HEX}{{1,4}}:){{7}}{_HEX}{{1,4}}$",
    "time": f"^{_TIME}$",
    "uuid": f"^{_HEX}{{8}}-({_HEX}{{4}}-){{3}}{_HEX}{{12}}$",
}


def text_of_length(grammar: Grammar, low: int, high: int | None) -> str:
    """Return the expression of a string with `low` to `high` (None: any number of) characters."""
    return f'"\\"" {grammar.repeat(grammar.rule(CHARACTER), low, high)} "\\""'


def text_of_pattern(grammar: Grammar, pattern: str, low: int, high: int | None) -> str:
    """Return the expression of a string that a pattern is found in, with `low` to `high` characters.

    Raises:
        MoeshardError: the pattern cannot be said by a grammar, or not together with such a length.
    """
    node = _of_length(parse(pattern), low, high)
    _limit(node)
    body = _Writer(grammar).expression(node)
    return f'"\\"" {body} "\\""'


def _of_length(node: Node, low: int, high: int | None) -> Node:
    """Return a tree with the texts of some length only."""
    least, most = lengths(node)
    if low <= least and (high is None or (most is not None and most <= high)):
        return node
    if isinstance(node, Choice):
        fitting = [option for option in node.options if _can_be(option, low, high)]
        if fitting:
            return Choice(tuple(_of_length(option, low, high) for option in fitting))
    parts = node.parts if isinstance(node, Chain) else (node,)
    free = [part for part in parts if lengths(part)[0] != lengths(part)[1]]
    if _can_be(node, low, high) and len(free) == 1 and isinstance(free[0], Repeat):
        repeat = free[0]
        one, same = lengths(repeat.node)
        if one == same:
            fixed = least - one * repeat.low
            begin = max(repeat.low, -(-(low - fixed) // one))
            ends = [end for end in (repeat.high, None if high is None else (high - fixed) // one) if end is not None]
            if not ends or begin <= min(ends):
                changed = Repeat(repeat.node, begin, min(ends) if ends else None)
                return Chain(tuple(changed if part is repeat else part for part in parts))
    raise MoeshardError("minLength or maxLength beside a pattern or format that is not of such a length anyway")


def _can_be(node: Node, low: int, high: int | None) -> bool:
    least, most = lengths(node)
    return (most is None or most >= low) and (high is None or least <= high)


def _limit(node: Node) -> None:
    """Refuse a pattern that a text can fit in too many ways at once, each of which has to be followed."""
    if isinstance(node, Repeat):
        least, most = lengths(node.node)
        many = node.high if node.high is not None else node.low
        if least != most and many > 1 and many * ((most or least) - least + 1) > _MAX_STATES:
            raise MoeshardError("a pattern with a long repetition within a long repetition")
        _limit(node.node)
    elif not isinstance(node, Chars):
        for part in node.parts if isinstance(node, Chain) else node.options:
            _limit(part)


class _Writer:
    def __init__(self, grammar: Grammar):
        self._grammar = grammar

    def expression(self, node: Node) -> str:
        if isinstance(node, Chars):
            return _one_of(node)
        if isinstance(node, Chain):
            return " ".join(self.expression(part) for part in node.parts) or EMPTY
        if isinstance(node, Choice):
            return either(self.expression(option) for option in node.options)
        if lengths(node.node)[1] == 0 or node.high == 0:
            return EMPTY
        inner, low = node.node, node.low
        if lengths(inner)[0] == 0:  # what is nothing may be left out instead
            inner, low = _not_empty(inner), 0
        return self._grammar.repeat(self._grammar.rule(self.expression(inner)), low, node.high)


def _not_empty(node: Node) -> Node:
    """Return a tree with the same texts but the empty one, where there are others."""
    if isinstance(node, Chars) or lengths(node)[0] > 0:
        return node
    if isinstance(node, Repeat):
        return Repeat(_not_empty(node.node), 1, node.high)
    if isinstance(node, Choice):
        return Choice(tuple(_not_empty(option) for option in node.options if lengths(option)[1] != 0))
    parts = [part for part in node.parts if lengths(part)[1] != 0]
    # The first part that is not empty decides.
    return Choice(tuple(Chain((_not_empty(part), *parts[at + 1 :])) for at, part in enumerate(parts)))


def _one_of(node: Chars) -> str:
    """Return the expression of a character as JSON writes it: itself, or escaped where it must be.

    Of control characters without a short escape those alone are written that nothing else stands beside.
    """
    raw = [(max(a, low), min(b, high)) for a, b in node.ranges for low, high in _RAW if max(a, low) <= min(b, high)]
    parts = [characters(raw)] if raw else []
    for code, letter in _SHORT.items():
        if any(low <= code <= high for low, high in node.ranges):
            parts.append(literal("\\" + letter))
    if not parts:
        codes = [code for low, high in node.ranges for code in range(low, min(high, 0x7F) + 1)]
        parts = [literal(f"\\u{code:04x}") for code in codes]
    if not parts:
        raise MoeshardError("a pattern with a class of no characters")
    return either(parts)
