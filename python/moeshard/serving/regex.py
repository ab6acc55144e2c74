"""Regular expressions as JSON schemas hold them (ECMA 262), read into a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from moeshard._core import MoeshardError
from moeshard.serving.grammar import MAX_REPEATS, Ranges

MAX_LENGTH = 2000
_MAX_DEPTH = 50
_LAST = 0x10FFFF

# Dialects differ in what \d, \w and \s mean beyond ASCII: these are in all of them. Of \D, \W and \S ASCII is.
_CLASSES: dict[str, Ranges] = {
    "d": ((0x30, 0x39),),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "s": ((0x09, 0x0D), (0x20, 0x20)),
}
_ESCAPES = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_NO_DOT: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))


@dataclass(frozen=True)
class Chars:
    """One of some characters."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Chain:
    """One after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of several."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """Something again and again."""

    node: Node
    low: int
    high: int | None


Node: TypeAlias = "Chars | Chain | Choice | Repeat"

ANY = Chars(((0, 0xD7FF), (0xE000, _LAST)))


def complement(ranges: Ranges, last: int = _LAST) -> tuple[tuple[int, int], ...]:
    """Return all characters but these, up to a last one; halves of surrogate pairs are none."""
    found, begin = [], 0
    for low, high in sorted([*ranges, (0xD800, 0xDFFF)]):
        if low > begin and begin <= last:
            found.append((begin, min(low - 1, last)))
        begin = max(begin, high + 1)
    if begin <= last:
        found.append((begin, last))
    return tuple(found)


def lengths(node: Node) -> tuple[int, int | None]:
    """Return how many characters a text has at least and at most (None: any number)."""
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, Repeat):
        low, high = lengths(node.node)
        if high == 0 or node.high == 0:
            return 0, 0
        return low * node.low, None if high is None or node.high is None else high * node.high
    both = [lengths(part) for part in (node.parts if isinstance(node, Chain) else node.options)]
    lows, highs = [low for low, _ in both], [high for _, high in both]
    if isinstance(node, Chain):
        return sum(lows), None if None in highs else sum(high for high in highs if high is not None)
    return min(lows), None if None in highs else max(high for high in highs if high is not None)


def parse(pattern: str) -> Node:
    """Read a pattern: a tree of the whole texts in which it is found.

    Raises:
        MoeshardError: it is no regular expression, or has what no grammar can say.
    """
    if len(pattern) > MAX_LENGTH:
        raise MoeshardError(f"a pattern has more than {MAX_LENGTH} characters")
    reader = _Reader(pattern)
    found = reader.choice(0, whole=True)
    if not reader.is_done:
        raise reader.wrong("unmatched )")
    return found


class _Reader:
    def __init__(self, pattern: str):
        self._pattern, self._at = pattern, 0

    @property
    def is_done(self) -> bool:
        return self._at == len(self._pattern)

    def wrong(self, why: str) -> MoeshardError:
        return MoeshardError(f"the pattern {self._pattern[:200]!r} cannot be heeded: {why} at character {self._at}")

    def _next(self) -> str:
        if self.is_done:
            raise self.wrong("it ends too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _take(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def choice(self, depth: int, *, whole: bool = False) -> Node:
        """Read alternatives; `whole`: those of the pattern itself, where ^ and $ may stand."""
        if depth > _MAX_DEPTH:
            raise self.wrong("groups are nested too deeply")
        options = [self._chain(depth, whole)]
        while self._take("|"):
            options.append(self._chain(depth, whole))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _chain(self, depth: int, whole: bool) -> Node:
        parts: list[Node] = []
        begins = whole and self._take("^")
        ends = False
        while not self.is_done and self._pattern[self._at] not in "|)":
            if ends:
                raise self.wrong("something behind $")
            if whole and self._take("$"):
                ends = True
            else:
                parts.append(self._repeated(self._atom(depth)))
        anything = Repeat(ANY, 0, None)
        if whole:
            parts = [*([] if begins else [anything]), *parts, *([] if ends else [anything])]
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def _repeated(self, node: Node) -> Node:
        if self._take("*"):
            low, high = 0, None
        elif self._take("+"):
            low, high = 1, None
        elif self._take("?"):
            low, high = 0, 1
        elif self._take("{"):
            low, high = self._counts()
        else:
            return node
        self._take("?")  # how greedy it is does not change which texts there are
        if not self.is_done and self._pattern[self._at] in "*+?{":
            raise self.wrong("a repetition of a repetition")
        return Repeat(node, low, high)

    def _counts(self) -> tuple[int, int | None]:
        end = self._pattern.find("}", self._at)
        low, comma, high = self._pattern[self._at : max(end, self._at)].partition(",")
        if not _is_number(low) or (high and not _is_number(high)):
            raise self.wrong("{ that is no repetition (write \\{)")
        self._at = end + 1
        least = int(low)
        most = int(high) if high else None if comma else least
        if max(least, most or 0) > MAX_REPEATS:
            raise self.wrong(f"more than {MAX_REPEATS} repetitions")
        if most is not None and most < least:
            raise self.wrong("a repetition from more to less")
        return least, most

    def _atom(self, depth: int) -> Node:
        char = self._next()
        if char == "(":
            if self._take("?"):
                self._group_kind()
            node = self.choice(depth + 1)
            if not self._take(")"):
                raise self.wrong("a group without an end")
            return node
        if char == "[":
            return Chars(self._members())
        if char == ".":
            return Chars(complement(_NO_DOT))
        if char == "\\":
            return Chars(self._escaped())
        if char in "^$":
            raise self.wrong(f"{char} within the pattern")
        if char in "*+?{":
            raise self.wrong("a repetition of nothing")
        return Chars(((ord(char), ord(char)),))

    def _group_kind(self) -> None:
        if self._take(":"):
            return
        is_named = self._take("<")
        if self._take("=") or self._take("!"):
            raise self.wrong("looking ahead or behind")
        if not is_named:
            raise self.wrong("this kind of group")
        while self._next() != ">":
            pass

    def _members(self) -> tuple[tuple[int, int], ...]:
        is_not = self._take("^")
        found: list[tuple[int, int]] = []
        while not self._take("]"):
            ranges = self._member()
            if self._pattern.startswith("-", self._at) and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                end = self._member()
                if len(ranges) != 1 or len(end) != 1 or ranges[0][0] != ranges[0][1] or end[0][0] != end[0][1]:
                    raise self.wrong("a range of more than characters")
                ranges = ((ranges[0][0], end[0][0]),)
                if ranges[0][0] > ranges[0][1]:
                    raise self.wrong("a range from more to less")
            found += ranges
        return complement(found) if is_not else complement(complement(found))

    def _member(self) -> tuple[tuple[int, int], ...]:
        char = self._next()
        if char == "\\":
            return ((8, 8),) if self._take("b") else self._escaped()
        return ((ord(char), ord(char)),)

    def _escaped(self) -> tuple[tuple[int, int], ...]:
        char = self._next()
        if char in _CLASSES:
            return tuple(_CLASSES[char])
        if char.lower() in _CLASSES:
            return complement(_CLASSES[char.lower()], 0x7F)
        if char == "0" and self._pattern[self._at : self._at + 1].isdigit():
            raise self.wrong("an octal number")
        if char in _ESCAPES:
            return ((_ESCAPES[char],) * 2,)
        if char == "c" and self._pattern[self._at : self._at + 1].isalpha():
            return ((ord(self._next()) % 32,) * 2,)
        if char in "xu":
            code = self._hex(char)
            return ((code, code),)
        if char.isalnum():
            raise self.wrong(f"\\{char}")
        return ((ord(char),) * 2,)

    def _hex(self, kind: str) -> int:
        if kind == "u" and self._take("{"):
            end = self._pattern.find("}", self._at)
            digits = self._pattern[self._at : max(end, self._at)]
            self._at = end + 1
        else:
            n = 2 if kind == "x" else 4
            digits = self._pattern[self._at : self._at + n]
            self._at += n
            if len(digits) != n:
                raise self.wrong("it ends too early")
        try:
            code = int(digits, 16) if digits.isalnum() else -1
        except ValueError:
            code = -1
        if not 0 <= code <= _LAST or 0xD800 <= code <= 0xDFFF:
            raise self.wrong(f"\\{kind} without a character's number")
        return code


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9
