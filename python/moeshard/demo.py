"""What half of the experts is worth, measured on the embedded model and texts.

Three runs of one model: with all experts; with the half of each layer that serves one domain of text best; and with
the first half of each layer. A half is a half in bytes and in speed; what differs is what the model can still predict.

The best half is chosen by saliency, Σ over tokens of gate weight · ‖expert output‖, on text that is not scored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from moeshard.arrays import Doubles, Tokens
from moeshard.evaluation.perplexity import Score, score
from moeshard.keep.text import Keep, format_row
from moeshard.progress import StepProgress
from moeshard.traffic.embedded import embedded_domains, embedded_text
from moeshard.traffic.windows import WINDOW, text_windows

if TYPE_CHECKING:
    from moeshard.runtime.model import Model
    from moeshard.runtime.trace import Trace

# So that the answers can be read side by side; other domains begin with their own held-out text.
PROMPTS = {
    "cpp": "#include <vector>\n\ntemplate <class T>\n",
    "de": "Der Paketverwalter von Debian",
    "en": "The package manager of Debian",
    "fr": "Le gestionnaire de paquets de Debian",
    "py": "import os\n\ndef main(args):\n",
}


@dataclass(frozen=True)
class TopExpert:
    """An expert and the share of its layer's gate mass that it took, 0 to 1."""

    id: int
    share: float


@dataclass
class Run:
    """One way to hold experts, and what the model did with them."""

    name: str
    keep: Keep | None
    """bool (n_layer, n_expert); None: all experts."""
    held: int
    """Experts held in each MoE layer."""
    bytes: int
    """Trunk and held experts."""
    text: str = ""
    """What followed the prompt."""
    tokens_per_second: float = 0.0
    """Of generating it; the median, so that a moment's other work on the machine does not show."""
    prompt_tokens_per_second: float = 0.0
    """Of scoring a window; the median too."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Domain -> score on its held-out text."""
    top_experts: dict[int, list[TopExpert]] = field(default_factory=dict)
    """MoE layer -> the experts that carried prompt and answer, heaviest first."""


@dataclass
class Demo:
    """The result of `run_demo`."""

    model: str
    """The name of its file, without the suffix."""
    arch: str
    n_layer: int
    n_expert: int
    n_expert_used: int
    domain: str
    """What the best half was chosen for."""
    prompt: str
    runs: list[Run] = field(default_factory=list)

    def loss(self, run: Run, domain: str) -> float:
        """How much `run` raises the perplexity on a domain, as a fraction of what all experts give."""
        return run.scores[domain].perplexity / self.runs[0].scores[domain].perplexity - 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "model": self.model,
            "arch": self.arch,
            "n_layer": self.n_layer,
            "n_expert": self.n_expert,
            "n_expert_used": self.n_expert_used,
            "domain": self.domain,
            "prompt": self.prompt,
            "runs": [self._run_dict(run) for run in self.runs],
        }

    def _run_dict(self, run: Run) -> dict[str, Any]:
        return {
            "name": run.name,
            "held": run.held,
            "keep": None if run.keep is None else [format_row(row) for row in run.keep],
            "bytes": run.bytes,
            "text": run.text,
            "tokens_per_second": run.tokens_per_second,
            "prompt_tokens_per_second": run.prompt_tokens_per_second,
            "perplexity": {domain: result.perplexity for domain, result in run.scores.items()},
            "perplexity_loss": {domain: self.loss(run, domain) for domain in run.scores},
            "scored_tokens": {domain: result.n_tokens for domain, result in run.scores.items()},
            "top_experts": {
                str(layer): [{"expert": top.id, "share": top.share} for top in tops]
                for layer, tops in run.top_experts.items()
            },
        }


def run_demo(
    model: Model,
    domain: str = "en",
    *,
    prompt: str | None = None,
    max_tokens: int = 64,
    n_windows: int = 4,
    n_calibration: int = 16,
    seed: int = 1,
    progress: StepProgress = lambda what, done, total: None,
) -> Demo:
    """Run the model with all experts and with two halves of them.

    Args:
        model: the embedded one, or any MoE model.
        domain: the embedded text that the best half is chosen for.
        prompt: what to continue; None for one of the domain.
        max_tokens: length of the answers.
        n_windows: windows of 256 tokens that are scored per domain.
        n_calibration: windows that the best half is chosen with.
        seed: of sampling, the same for all runs.
        progress: see `StepProgress`.

    Raises:
        MoeshardError: the model is dense, or there is no such domain.
    """
    half = max(model.n_expert // 2, model.n_expert_used)
    steps = _Steps(progress, n_calibration + 3 * (1 + n_windows * len(embedded_domains())))
    calibration = text_windows(model.tokenize(embedded_text(domain, "calibration")), WINDOW, n_calibration)
    heldout = {
        name: text_windows(model.tokenize(embedded_text(name, "heldout")), WINDOW, n_windows)
        for name in embedded_domains()
    }
    demo = Demo(
        model=Path(model.path).stem,
        arch=model.arch,
        n_layer=model.n_layer,
        n_expert=model.n_expert,
        n_expert_used=model.n_expert_used,
        domain=domain,
        prompt=prompt or PROMPTS.get(domain) or model.detokenize(heldout[domain][0][:16]),
    )
    best = top_experts(saliency(model, calibration, steps), half)
    keeps: list[tuple[str, Keep | None]] = [
        ("all experts", None),
        (f"best half for {domain}", best),
        ("first half", model.keep(f"0-{half - 1}")),
    ]
    for name, keep in keeps:
        run = Run(name, keep, model.n_expert if keep is None else half, _held_bytes(model, keep))
        steps.begin(f"generating with {name}")
        _generate(model, demo.prompt, run, max_tokens, seed)
        steps.advance()
        demo.runs.append(run)
    _score(model, heldout, demo.runs, steps)
    return demo


class _Steps:
    """Counts what is done, for `StepProgress`."""

    def __init__(self, progress: StepProgress, total: int):
        self._progress, self._total = progress, total
        self._what, self._done = "", 0

    def begin(self, what: str) -> None:
        self._what = what
        self._progress(what, self._done, self._total)

    def advance(self) -> None:
        self._done += 1
        self._progress(self._what, self._done, self._total)


def routed(trace: Trace, n_layer: int, n_expert: int) -> Doubles:
    """Sum what a trace sent to each expert: gate weights, times the norms of the outputs if it has them.

    Returns float64 ``(n_layer, n_expert)``; rows of dense layers are 0.
    """
    sums = np.zeros((n_layer, n_expert))
    values = trace.weights if trace.norms is None else trace.contributions()
    for i, layer in enumerate(trace.layers):
        chosen = trace.ids[i] >= 0
        sums[layer] = np.bincount(trace.ids[i][chosen], values[i][chosen], n_expert)
    return sums


def saliency(model: Model, windows: list[Tokens], steps: _Steps) -> Doubles:
    """Sum gate weight · ‖expert output‖ over the tokens of all windows; float64 ``(n_layer, n_expert)``."""
    sums = np.zeros((model.n_layer, model.n_expert))
    steps.begin("finding the experts that matter")
    for window in windows:
        sums += routed(model.trace(window[:-1], norms=True), model.n_layer, model.n_expert)
        steps.advance()
    return sums


def top_experts(values: Doubles, count: int) -> Keep:
    """Keep the `count` experts with the largest values in each layer; the first ones among equals.

    `values` and the result have shape ``(n_layer, n_expert)``.
    """
    keep = np.zeros(values.shape, dtype=np.bool_)
    np.put_along_axis(keep, np.argsort(-values, axis=1, kind="stable")[:, :count], True, axis=1)
    return keep


def _score(model: Model, heldout: dict[str, list[Tokens]], runs: list[Run], steps: _Steps) -> None:
    """Score every window with every run in turn: what slows the machine for a while slows all of them."""
    speeds: dict[str, list[float]] = {run.name: [] for run in runs}
    for domain, windows in heldout.items():
        steps.begin(f"scoring {domain}")
        for window in windows:
            for run in runs:
                result = score(model, [window], run.keep)
                speeds[run.name].append(result.tokens_per_second)
                before = run.scores.get(domain)
                run.scores[domain] = result if before is None else before + result
                steps.advance()
    for run in runs:
        run.prompt_tokens_per_second = median(speeds[run.name])


def _generate(model: Model, prompt: str, run: Run, max_tokens: int, seed: int, n_top: int = 3) -> None:
    answer = model.generate(
        prompt, run.keep, max_tokens=max_tokens, temperature=0.7, repeat_penalty=1.1, seed=seed, ignore_end=True
    )
    seconds = []
    start, seen = 0.0, 0
    for _ in answer:
        now, count = perf_counter(), len(answer.tokens)
        if seen:  # the first token waits for the prompt
            seconds.append((now - start) / (count - seen))
        start, seen = now, count
    run.text = answer.text
    run.tokens_per_second = 1 / median(seconds) if seconds else 0.0
    tokens = np.concatenate([answer.prompt_tokens, answer.tokens])
    mass = routed(model.trace(tokens, run.keep), model.n_layer, model.n_expert)
    for layer in model.moe_layers:
        total = mass[layer].sum()
        order = np.argsort(-mass[layer], kind="stable")[:n_top]
        run.top_experts[layer] = [TopExpert(int(i), float(mass[layer, i] / total)) for i in order]


def _held_bytes(model: Model, keep: Keep | None) -> int:
    layout = model.layout
    if keep is None:
        return layout.trunk_bytes + layout.expert_bytes
    held = sum(int(keep[layer].sum()) * layout.per_expert_bytes[layer] for layer in layout.moe_layers)
    return layout.trunk_bytes + held
