"""Text cut into pieces to compute: sequences to measure routing on, and windows to predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from moeshard._core import MoeshardError
from moeshard.arrays import Tokens, TokensLike
from moeshard.traffic.domains import Domain, check_names, tokens_of

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

SEQUENCE = 512
"""Tokens of a sequence to measure routing on, where the model was trained on as many."""
WINDOW = 256
"""Tokens predicted in a window."""
_SHORTEST = 16
"""Less than this says nothing about a sequence."""

_T = TypeVar("_T")


def sequences(model: Model, domain: Domain, window: int, most_tokens: int | None = None) -> list[Tokens]:
    """Cut the documents of a domain into sequences.

    Args:
        model: whose tokenizer is used.
        domain: its documents; none is joined with another.
        window: tokens of a sequence; the last one of a document may be shorter.
        most_tokens: about so many in all, evenly spread over the documents; None: all.

    Returns:
        int32 arrays, (window,) or shorter.

    Raises:
        MoeshardError: there is too little text for a single sequence.
    """
    found: list[Tokens] = []
    for text in domain.texts:
        tokens = tokens_of(model, text)
        pieces = [tokens[at : at + window] for at in range(0, len(tokens), window)]
        found += [piece for piece in pieces if len(piece) >= min(_SHORTEST, window)]
    if not found:
        raise MoeshardError(f"text '{domain.name}' has fewer than {_SHORTEST} tokens: too little to say anything")
    if most_tokens is None:
        return found
    mean = sum(map(len, found)) / len(found)
    chosen = _spread(found, max(1, round(most_tokens / mean)))
    return chosen if len(chosen) > 1 else [chosen[0][: max(most_tokens, _SHORTEST)]]


def default_window(model: Model) -> int:
    """Return how many tokens a sequence has unless told otherwise."""
    return min(SEQUENCE, model.n_ctx_train or SEQUENCE)


def text_windows(tokens: TokensLike, size: int = WINDOW, count: int | None = None) -> list[Tokens]:
    """Cut a text into windows that can be scored independently.

    Args:
        tokens: integer ids ``(n,)``.
        size: tokens predicted per window.
        count: at most so many, evenly spread over the text (its beginning may be unlike the rest); None: all that fit.

    Returns:
        int32 arrays ``(size + 1,)``: every token but the first is predicted. Neighbours share one token, so that no
        token is predicted twice.

    Raises:
        MoeshardError: the text is shorter than one window.
    """
    array = np.asarray(tokens, dtype=np.int32)
    fitting = (array.size - 1) // size if size > 0 else 0
    if fitting < 1:
        raise MoeshardError(f"a text of {array.size} tokens is too short for a window that predicts {size}")
    return [array[i * size : (i + 1) * size + 1] for i in _spread(range(fitting), count)]


def cut_windows(
    model: Model, domains: Sequence[Domain], window: int, n_windows: int | None
) -> tuple[list[Tokens], list[int]]:
    """Cut windows from every document of some domains.

    Args:
        model: whose tokenizer is used.
        domains: each with a name of its own.
        window: tokens predicted in each.
        n_windows: per domain, evenly spread over it; None: all that fit.

    Returns:
        Arrays int32 (window + 1,), and for each of them the index of its domain.

    Raises:
        MoeshardError: there is no text, two domains have one name, or a domain has no document as long as a window.
    """
    if not domains:
        raise MoeshardError("there is no text to predict")
    check_names(domains)
    windows: list[Tokens] = []
    owners: list[int] = []
    for index, domain in enumerate(domains):
        documents = [tokens_of(model, text) for text in domain.texts]
        found = [piece for tokens in documents if tokens.size > window for piece in text_windows(tokens, window)]
        if not found:
            raise MoeshardError(f"text '{domain.name}' is too short: it has no window of {window + 1} tokens")
        chosen = _spread(found, n_windows)
        windows += chosen
        owners += [index] * len(chosen)
    return windows, owners


def _spread(pieces: Sequence[_T], count: int | None) -> list[_T]:
    """Return `count` of the pieces, at least one, evenly spread; all of them where they are no more, or for None."""
    number = len(pieces) if count is None else max(1, min(count, len(pieces)))
    return [pieces[k * len(pieces) // number] for k in range(number)]
