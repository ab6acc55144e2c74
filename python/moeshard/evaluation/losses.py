"""What nodes lose against the whole model, teacher-forced: masks on it, before any node exists, or the nodes' shards.

The whole model and all nodes read the same text window by window; those that are masks on one model do so in the same
batches, a sequence each. A window begins with a prompt, by which its session is placed on a node; losses are those of
what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeshard._core import MoeshardError
from moeshard.arrays import Doubles, Floats, Ints
from moeshard.keep.text import Keep
from moeshard.placement.nodes import NodeModel, by_model, masked_nodes
from moeshard.placement.probes import goodness, saliency_held
from moeshard.progress import Progress
from moeshard.runtime.logits import LOGIT_BYTES, log_sum_exp, token_losses
from moeshard.traffic.domains import Domain
from moeshard.traffic.windows import WINDOW, cut_windows

if TYPE_CHECKING:
    from moeshard.runtime.model import Model
    from moeshard.runtime.session import Session


PROMPT = 64


@dataclass(frozen=True, eq=False)
class Losses:
    """S windows of text under the whole model and on G nodes, each with a keep; T tokens are predicted in each."""

    domains: list[str]
    domain: Ints
    """int (S,): index of each window's domain."""
    n_prompt: int
    """Of the T tokens, so many belong to the prompt."""
    full: Floats
    """float32 (S, T): negative log-likelihood of each token, nats."""
    groups: Floats
    """float32 (G, S, T)."""
    kl: Floats
    """float32 (G, S, T): Kullback-Leibler divergence of the keep's prediction from the whole model's, nats."""
    same: npt.NDArray[np.bool_]
    """bool (G, S, T): both find the same token likeliest."""
    captured: Doubles
    """float64 (G, S): share of the prompt's saliency, by the whole model's router, that the keep holds."""
    missed: Floats | None = None
    """float32 (G, S, T): what each token missed, see `Session.missed`; None where a node is no mask."""

    def select(self, nodes: Sequence[int]) -> Losses:
        """Return the losses on some of the nodes, by their indices; a node may stand several times."""
        rows = list(nodes)
        return replace(
            self,
            groups=self.groups[rows],
            kl=self.kl[rows],
            same=self.same[rows],
            missed=None if self.missed is None else self.missed[rows],
            captured=self.captured[rows],
        )

    @property
    def after(self) -> slice:
        """The tokens after the prompt."""
        return slice(self.n_prompt, None)

    def mean(self, values: npt.NDArray[np.floating]) -> float:
        """Return the mean over windows (S,), each domain counting alike."""
        return float(np.mean([values[self.domain == index].mean() for index in range(len(self.domains))]))

    def by_domain(self, values: npt.NDArray[np.floating]) -> dict[str, float]:
        """Return the mean over the windows (S,) of each domain."""
        return {name: float(values[self.domain == index].mean()) for index, name in enumerate(self.domains)}

    def full_loss(self) -> Doubles:
        """Return float64 (S,): mean loss after the prompt under the whole model, nats per token."""
        loss: Doubles = self.full[:, self.after].mean(axis=1, dtype=np.float64)
        return loss

    def group_losses(self) -> Doubles:
        """Return float64 (G, S): the same under each keep."""
        losses: Doubles = self.groups[:, :, self.after].mean(axis=2, dtype=np.float64)
        return losses

    def placement(self, probe: str = "both") -> Ints:
        """Return int (S,): the node that each session is placed on.

        `probe` is ``loss``: the node that predicts the prompt itself best; ``saliency``: the one that holds most of the
        experts that the whole model's router wants for the prompt; ``both``: by the sum of minus the loss and the
        logarithm of what it holds; ``oracle``: the one that will be best.
        """
        loss = self.groups[:, :, : self.n_prompt].mean(axis=2, dtype=np.float64)
        scores = -self.group_losses() if probe == "oracle" else goodness(probe, loss, self.captured)
        node: Ints = scores.argmax(axis=0)
        return node

    def placed_losses(self, node: Ints) -> Doubles:
        """Return float64 (S,): the loss of each session on the node (S,) it was placed on."""
        placed: Doubles = self.group_losses()[node, np.arange(node.size)]
        return placed


def measure_losses(
    model: Model,
    keeps: Sequence[Keep],
    domains: Sequence[Domain],
    *,
    nodes: Sequence[NodeModel] | None = None,
    n_windows: int | None = None,
    window: int = WINDOW,
    n_prompt: int = PROMPT,
    progress: Progress | None = None,
) -> Losses:
    """Predict text under the whole model and under each keep, in one pass. No more than one window is held at a time.

    Args:
        model: the whole model.
        keeps: bool (n_layer, n_expert) each.
        domains: text that nothing was chosen by.
        nodes: what computes for each keep, of `moeshard.placement.nodes`; None: masks on the model.
        n_windows: per domain, evenly spread over it; None: all that fit.
        window: tokens predicted in each.
        n_prompt: of them, so many are the prompt.
        progress: see `Progress`; in windows.

    Raises:
        MoeshardError: a keep does not fit the model, or a text is shorter than a window.
    """
    if not 0 < n_prompt < window:
        raise MoeshardError(f"a prompt of {n_prompt} tokens does not fit a window of {window}; leave some to predict")
    if model.n_ctx_train and window > model.n_ctx_train:
        raise MoeshardError(f"windows of {window} tokens: the model was trained on {model.n_ctx_train} at most")
    nodes = masked_nodes(model, keeps) if nodes is None else nodes
    windows, owners = cut_windows(model, domains, window, n_windows)
    shape = (len(keeps), len(windows), window)
    losses = Losses(
        [domain.name for domain in domains],
        np.array(owners),
        n_prompt,
        np.empty(shape[1:], dtype=np.float32),
        np.empty(shape, dtype=np.float32),
        np.empty(shape, dtype=np.float32),
        np.empty(shape, dtype=bool),
        np.empty(shape[:2]),
        np.empty(shape, dtype=np.float32) if all(node.keep is not None for node in nodes) else None,
    )
    with ExitStack() as stack:
        stack.enter_context(model.masked(None))  # the whole model, whatever mask the caller's thread runs it under
        runs = [_Run(stack, found, own, window) for found, own in by_model(model, nodes)]
        held = 1 + max(len(run.seqs) for run in runs)  # the whole model's beside those of a run
        step = max(1, min(window, LOGIT_BYTES // (held * model.n_vocab * 4)))
        for row, tokens in enumerate(windows):
            for run in runs:
                run.session.reset()
            for at in range(0, window, step):
                piece = slice(at, min(at + step, window))
                _predict(losses, row, piece, runs, tokens)
            if progress is not None:
                progress(row + 1, len(windows))
        losses.captured[:] = saliency_held(model, keeps, [tokens[:n_prompt] for tokens in windows])
    return losses


class _Run:
    """A session in which the nodes of one model read the same tokens, a sequence each."""

    def __init__(self, stack: ExitStack, model: Model, own: list[tuple[int | None, Keep | None]], window: int) -> None:
        self.seqs = [index for index, _ in own]
        self.session: Session = stack.enter_context(model.session(n_seq=len(own), n_ctx=window))
        for seq, (_, keep) in enumerate(own):
            if keep is not None:
                self.session.set_keep(keep, seq)
                self.session.set_meter(True)


@dataclass(frozen=True)
class _Whole:
    """The whole model's predictions of n tokens."""

    logits: Floats
    norm: Doubles
    """Logarithm of the sum of their exponentials (n,)."""
    probs: Floats
    likeliest: Ints


def _predict(losses: Losses, row: int, piece: slice, runs: list[_Run], window: npt.NDArray[np.int32]) -> None:
    """Enter the predictions of some tokens of one window."""
    targets = window[1:][piece]
    whole: _Whole | None = None
    for run in runs:
        logits = run.session.decode(dict.fromkeys(range(len(run.seqs)), window[:-1][piece]), "all")
        for seq, index in enumerate(run.seqs):
            own = logits.pop(seq)
            norm = log_sum_exp(own)
            loss = token_losses(own, targets, norm)
            if index is None:
                whole = _Whole(own, norm, np.exp(own - norm.astype(np.float32)[:, None]), own.argmax(axis=1))
                losses.full[row, piece] = loss
                continue
            assert whole is not None  # it is the first of the first run
            kl = np.einsum("tv,tv->t", whole.probs, whole.logits - own) - whole.norm + norm
            losses.groups[index, row, piece] = loss
            if losses.missed is not None:
                losses.missed[index, row, piece] = run.session.missed(seq)
            losses.kl[index, row, piece] = kl
            losses.same[index, row, piece] = own.argmax(axis=1) == whole.likeliest
