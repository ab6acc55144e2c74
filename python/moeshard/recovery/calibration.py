"""The text that recoveries are fitted to: windows, the node that each belongs to, and those held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeshard._core import MoeshardError
from moeshard.arrays import Ints, Tokens
from moeshard.keep.text import Keep
from moeshard.placement.nodes import NodeModel
from moeshard.placement.probes import goodness, prompt_losses, saliency_held
from moeshard.progress import Progress
from moeshard.traffic.domains import Domain
from moeshard.traffic.windows import cut_windows

if TYPE_CHECKING:
    from moeshard.runtime.model import Model

EACH = 8
"""Of the windows of a node and domain, each so many-th is held out."""
FEWEST = 8
"""Windows that a node needs."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of text, int32 (n_tokens,) each, and what they are for."""

    windows: list[Tokens]
    domain: Ints
    """int (S,): index of each window's domain."""

    def divide(self, mine: Ints) -> list[tuple[list[Tokens], list[Tokens]]]:
        """Divide some of the windows, by their indices, into those to fit to and those to judge by, twice.

        Those of each domain are divided alike, so that both have all kinds of text. The two parts that are returned
        have different domains, so that what is fitted to one can be judged by the other; of one domain the second part
        is empty.

        Raises:
            MoeshardError: they are too few.
        """
        parts: list[tuple[list[tuple[int, Tokens]], list[tuple[int, Tokens]]]] = [([], []), ([], [])]
        found, counts = np.unique(self.domain[mine], return_counts=True)
        for place, index in enumerate(found[np.argsort(-counts, kind="stable")]):
            fit, judge = parts[place % 2]
            for number, window in enumerate(mine[self.domain[mine] == index]):
                (judge if number % EACH == EACH // 2 else fit).append((number, self.windows[window]))
        if len(mine) < FEWEST or not parts[0][1]:
            raise MoeshardError(
                f"the text is too short to fit experts to: {len(mine)} windows, at least {FEWEST} are needed, and "
                f"{EACH // 2 + 1} of some kind of text; give more text (--text, -n)"
            )
        # Domains in turn: where only the beginning of a part is held, it has all of them.
        return [(_in_turn(fit), _in_turn(judge)) for fit, judge in parts]


def _in_turn(numbered: list[tuple[int, Tokens]]) -> list[Tokens]:
    return [window for _, window in sorted(numbered, key=lambda one: one[0])]


def calibrate(model: Model, domains: Sequence[Domain], window: int, n_windows: int | None) -> Calibration:
    """Cut windows of text.

    Raises:
        MoeshardError: a text is shorter than a window.
    """
    windows, owners = cut_windows(model, domains, window, n_windows)
    return Calibration([tokens[:-1] for tokens in windows], np.array(owners))


def owners(
    model: Model,
    keeps: Sequence[Keep],
    nodes: Sequence[NodeModel],
    calibration: Calibration,
    n_prompt: int,
    progress: Progress | None = None,
) -> Ints:
    """Return int (S,): the node that each window would be placed on by its first tokens, as sessions are."""
    if len(nodes) == 1:
        return np.zeros(len(calibration.windows), dtype=np.int64)
    prompts = [tokens[: n_prompt + 1] for tokens in calibration.windows]
    losses = np.empty((len(nodes), len(prompts)))
    for index, prompt in enumerate(prompts):
        losses[:, index] = prompt_losses(model, nodes, prompt, n_prompt + 1)[1:].mean(axis=1, dtype=np.float64)
        if progress is not None:
            progress(index + 1, len(prompts))
    held = saliency_held(model, keeps, prompts)
    owner: Ints = goodness("both", losses, held).argmax(axis=0)
    return owner
