"""A grammar in the making (GBNF, as llama.cpp reads it): rules, each written once, and not too many of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from moeshard._core import MoeshardError

MAX_REPEATS = 100_000
MAX_WEIGHT = 30_000
_BLOCK = 100

EMPTY = '""'
"""The expression of the empty text."""

NOTHING = r"[\x00]"
"""The expression that no text fits."""

Ranges: TypeAlias = "Sequence[tuple[int, int]]"
"""Characters, as code points from and to."""


class Grammar:
    """Rules with names. What is called an expression is what may stand in a rule."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._weight = 0

    def rule(self, body: str) -> str:
        """Return the name of a rule; alternatives may stand in it."""
        name = self._names.get(body)
        if name is None:
            name = self._names[body] = self.reserve()
            self.define(name, body)
        return name

    def reserve(self) -> str:
        """Return a name that rules can use before `define` says what it is."""
        name = f"r{len(self._rules)}"
        self._rules[name] = ""
        return name

    def define(self, name: str, body: str) -> None:
        """Say what a name stands for."""
        self._rules[name] = body
        self._weigh(len(body) // 8 + 1)

    def repeat(self, item: str, low: int, high: int | None) -> str:
        """Return an expression of `low` to `high` (None: any number) of a rule that is never empty.

        llama.cpp makes a rule of each repetition that may be left out, and takes 2,000: longer ones are made of blocks.
        """
        if max(low, high or 0) > MAX_REPEATS:
            raise MoeshardError(f"it asks for more than {MAX_REPEATS} characters or items")
        if high == 0:
            return EMPTY
        parts = []
        if low:
            parts.append(self._exactly(item, low))
        if high is None:
            parts.append(f"{item}*")
        elif high > low:
            parts.append(self._at_most(item, high - low))
        return " ".join(parts)

    def _exactly(self, item: str, n: int) -> str:
        self._weigh(n // _BLOCK + n % _BLOCK)
        if n <= _BLOCK:
            return item if n == 1 else f"{item}{{{n}}}"
        blocks = f"{self._block(item)}{{{n // _BLOCK}}}"
        return f"{blocks} {item}{{{n % _BLOCK}}}" if n % _BLOCK else blocks

    def _at_most(self, item: str, n: int) -> str:
        if n < _BLOCK:
            self._weigh(4 * n)
            return f"{item}?" if n == 1 else f"{item}{{0,{n}}}"
        some = self.rule(self._at_most(item, _BLOCK - 1))
        rest = self.rule(self._at_most(item, n % _BLOCK)) if n % _BLOCK else ""
        for _ in range(n // _BLOCK):
            rest = self.rule(f"{self._block(item)} {rest} | {some}")
        return rest

    def _block(self, item: str) -> str:
        body = f"{item}{{{_BLOCK}}}"
        self._weigh(0 if body in self._names else _BLOCK)
        return self.rule(body)

    def _weigh(self, weight: int) -> None:
        self._weight += weight
        if self._weight > MAX_WEIGHT:
            raise MoeshardError("it is too large: too many names, alternatives and repetitions")

    def text(self, root: str) -> str:
        """Return the grammar of what the rule `root` stands for."""
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._rules.items()), ""])


def literal(text: str) -> str:
    """Return the expression of a text that is not empty."""
    return '"' + "".join(_escaped(ord(char)) for char in text) + '"'


def characters(ranges: Ranges) -> str:
    """Return the expression of one of some characters."""
    return "[" + "".join(_escaped(low) + (f"-{_escaped(high)}" if high > low else "") for low, high in ranges) + "]"


def either(expressions: Iterable[str]) -> str:
    """Return the expression of one of several."""
    found = list(dict.fromkeys(expressions))
    return found[0] if len(found) == 1 else f"( {' | '.join(found)} )"


def _escaped(code: int) -> str:
    char = chr(code)
    if char.isascii() and (char.isalnum() or char in " _:,.;{}()/+@=<>!?*&%#'~|"):
        return char
    return f"\\x{code:02X}" if code < 0x80 else f"\\U{code:08X}"
