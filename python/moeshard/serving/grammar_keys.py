"""Names of an object that are none of those that its schema names, as a grammar."""

from __future__ import annotations

from collections.abc import Sequence

from moeshard.serving.grammar import Grammar, characters, either, literal
from moeshard.serving.regex import complement

# Characters that stand for themselves in a string of JSON. Others are not written in such a name: each would have a
# second way to be written, by which a name could be one of those after all.
_MAX_COMMON = 64
_PLAIN = complement([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F)])


def other_keys(grammar: Grammar, names: Sequence[str]) -> str:
    """Return the rule of the strings that are none of these; without any: of all strings."""
    if not names:
        return "string"
    return grammar.rule(f'"\\"" {_after(grammar, sorted(set(names)), 0)}')


def _after(grammar: Grammar, names: Sequence[str], n: int) -> str:
    """Return the rule of the rest of a string whose `n` characters so far begin each of these names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if len(name) > n:
            groups.setdefault(name[n], []).append(name)
    taken = [(ord(char), ord(char)) for char in groups]
    others = [
        (max(a, low), min(b, high)) for a, b in complement(taken) for low, high in _PLAIN if max(a, low) <= min(b, high)
    ]
    any_rest = grammar.rule(f'{characters(_PLAIN)}* "\\""')
    options = [f"{characters(others)} {any_rest}"]
    if all(len(name) > n for name in names):
        options.append('"\\""')
    for char, group in groups.items():
        # What begins like a very long name is not written at all.
        if n < _MAX_COMMON and any(low <= ord(char) <= high for low, high in _PLAIN):
            options.append(f"{literal(char)} {_after(grammar, group, n + 1)}")
    return grammar.rule(either(options))
