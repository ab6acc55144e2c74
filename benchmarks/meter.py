"""What the meter wins back of what sessions lose that change their domain half-way, and whom it moves that do not.

    moeshard analyze tinymoe -n 4000 -o profile.npz
    moeshard plan tinymoe --profile profile.npz --groups 4 --keep 32 -o plan.json
    python benchmarks/meter.py plan.json [--sessions N] [--still N]

Sessions are held-out text of 512 tokens. Half of a session is of one domain and half of another, in all ordered pairs
of domains; others are of one domain. When to look at a session again is learned on the first half of each domain's
held-out text, with `moeshard.evaluation.alarms`; sessions are cut from the second half. A session is placed by the
losses of its first 64 tokens, on a node, whatever it loses there; from then on a node sees its own masked stream alone.
Where the meter passes its limit, the latest text is predicted by all nodes, as the server does it
(`moeshard.placement.meter`). Losses are nats per token over the whole model: of the tokens behind the first 64, each by
the node that has the session at that token, which has read all of the session itself, as it does after a move.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

import moeshard
from moeshard.evaluation.alarms import Alarms, learn_alarms
from moeshard.evaluation.losses import PROMPT, measure_losses
from moeshard.placement.meter import Meter, n_deciding, place_again
from moeshard.placement.nodes import plan_nodes
from moeshard.placement.placement import planned_model
from moeshard.planning.plan import Plan
from moeshard.runtime.logits import log_sum_exp, token_losses
from moeshard.serving.probing import CONTEXT
from moeshard.traffic.domains import Domain, embedded_traffic

HALF = 256
N_PROBE = 256

Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]


class Reader:
    """The whole model and all nodes, side by side."""

    def __init__(self, model: moeshard.Model, plan: Plan):
        self.names = [node.name for node in plan.nodes]
        self.session = model.session(n_seq=1 + len(self.names), n_ctx=2 * HALF)
        for seq, node in enumerate(plan.nodes, 1):
            self.session.set_keep(node.keep, seq)
        self.session.set_meter(True)

    def read(self, tokens: Tokens) -> tuple[Doubles, Doubles]:
        """Return losses (1 + G, T) of all tokens but the first, the whole model first; what is missed (G, T + 1)."""
        self.session.reset()
        logits = self.session.decode(dict.fromkeys(range(1 + len(self.names)), tokens), "all")
        rows = [logits[seq][:-1] for seq in range(1 + len(self.names))]
        losses = [token_losses(row, tokens[1:], log_sum_exp(row)) for row in rows]
        missed = [self.session.missed(seq) for seq in range(1, 1 + len(self.names))]
        return np.array(losses, dtype=np.float64), np.array(missed, dtype=np.float64)

    def latest(self, tokens: Tokens, n: int) -> Doubles:
        """Return losses (1 + G, n) of the last tokens, as `LocalProber.latest`."""
        n = min(n, N_PROBE - 1, tokens.size - 1)
        return self.read(tokens[-min(n + CONTEXT, N_PROBE) :])[0][:, -n:]


@dataclass
class Course:
    """What became of a session."""

    first: Doubles
    """Excess losses of its halves on each node (2, G)."""
    once: int
    metered: Doubles
    """Excess losses of its halves where the meter put it (2,)."""
    moves: list[int] = field(default_factory=list)
    """Tokens before each move."""
    probes: int = 0

    @property
    def still(self) -> bool:
        """No node would have been better than its own, in either half."""
        return bool((self.first.argmin(axis=1) == self.once).all())


def follow(reader: Reader, alarms: Alarms, tokens: Tokens) -> Course:
    losses, missed = reader.read(tokens)
    excess = losses[1:] - losses[0]
    halves = (slice(PROMPT, HALF), slice(HALF, None))
    node = once = int(losses[1:, :PROMPT].mean(axis=1).argmin())
    limits = alarms.limits()
    course = Course(np.array([excess[:, half].mean(axis=1) for half in halves]), once, np.empty(2))
    where = np.full(excess.shape[1], once)
    meter = Meter(limits.get(reader.names[node]))
    for at in range(PROMPT, excess.shape[1]):
        where[at] = node
        meter.add([missed[node, at]])
        if not meter.passed or at + 1 == excess.shape[1]:
            continue
        found = reader.latest(tokens[: at + 1], n_deciding(meter.n_since))
        course.probes += 1
        placed = place_again(reader.names, found[1:], found[0], reader.names[node], min_quality=0)
        if placed is None:
            meter.stayed()
        else:
            assert placed.index is not None
            node = placed.index
            course.moves.append(at + 1)
            meter = Meter(limits.get(reader.names[node]))
    own = excess[where, np.arange(where.size)]
    course.metered = np.array([own[half].mean() for half in halves])
    return course


class Cutter:
    """Hands out pieces of each domain's text, which do not overlap."""

    def __init__(self, model: moeshard.Model, domains: Sequence[Domain]):
        self._texts = [model.tokenize("".join(domain.texts)) for domain in domains]
        self._used = [0] * len(domains)

    def cut(self, domain: int, n: int) -> Tokens:
        begin = self._used[domain]
        self._used[domain] += n
        if begin + n > self._texts[domain].size:
            raise SystemExit("the text is too short for so many sessions; ask for fewer")
        return self._texts[domain][begin : begin + n]


def halved(domains: Sequence[Domain], second: bool) -> list[Domain]:
    found = []
    for domain in domains:
        text = "".join(domain.texts)
        middle = len(text) // 2
        found.append(Domain(domain.name, (text[middle:] if second else text[:middle],)))
    return found


def mean(courses: Sequence[Course], which: str) -> float:
    """Mean excess of the second halves."""
    ways = {
        "once": lambda course: course.first[1, course.once],
        "metered": lambda course: course.metered[1],
        "oracle": lambda course: course.first[1].min(),
    }
    return float(np.mean([ways[which](course) for course in courses]))


def won_back(courses: Sequence[Course]) -> float:
    once, oracle = mean(courses, "once"), mean(courses, "oracle")
    return (once - mean(courses, "metered")) / (once - oracle)


def interval(courses: Sequence[Course]) -> tuple[float, float]:
    """95 %, by drawing sessions again."""
    rng = np.random.default_rng(0)
    draws = [won_back([courses[i] for i in rng.integers(0, len(courses), len(courses))]) for _ in range(2000)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def looks(courses: Sequence[Course]) -> str:
    moved = np.mean([bool(course.moves) for course in courses])
    return f"{moved:.1%} are moved, with {np.mean([course.probes for course in courses]):.2f} looks each"


def show_changing(courses: Sequence[Course]) -> None:
    low, high = interval(courses)
    print("\n| second half of sessions that change, nats per token over the whole model | |\n|---|---|")
    for name, what in (("once", "placed once"), ("metered", "placed again by the meter"), ("oracle", "oracle")):
        print(f"| {what} | {mean(courses, name):.3f} |")
    print(f"| won back | {won_back(courses):.1%} [{low:.1%}–{high:.1%}] |")
    late = [[at - HALF for at in course.moves if at >= HALF] for course in courses]
    after = [min(tokens) for tokens in late if tokens]
    print(f"\n{len(courses)} sessions change: {looks(courses)}")
    print(
        f"tokens of the second half before the move: median {np.median(after):.0f}, 90 % {np.quantile(after, 0.9):.0f}"
    )


def show_alone(courses: Sequence[Course]) -> None:
    still = [course for course in courses if course.still]
    gains = [float((course.first[:, course.once] - course.metered).mean()) for course in courses if course.moves]
    print(f"{len(courses)} sessions of one domain: {looks(courses)}")
    print(
        f"of them {len(gains)} moved: they gain {np.mean(gains):.2f} nats per token, {sum(g < 0 for g in gains)} lose"
    )
    print(f"{len(still)} had the best node in both halves: {looks(still)}")
    once, metered = (np.mean([way(course) for course in courses]) for way in (
        lambda course: course.first[:, course.once].mean(), lambda course: course.metered.mean()))  # fmt: skip
    best = np.mean([course.first.mean(axis=0).min() for course in courses])
    print(
        f"nats per token over the whole model: placed once {once:.3f}, by the meter {metered:.3f}, best node {best:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument("--sessions", type=int, default=1, help="of each ordered pair of domains")
    parser.add_argument("--still", type=int, default=10, help="sessions of each domain alone")
    parser.add_argument("--windows", type=int, default=16, help="of each domain, to learn on")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    plan = moeshard.read_plan(options.plan)
    model = moeshard.Model(planned_model(plan), n_threads=options.threads)
    domains = embedded_traffic("heldout")
    keeps = [node.keep for node in plan.nodes]
    learned = measure_losses(
        model, keeps, halved(domains, False), nodes=plan_nodes(model, plan), n_windows=options.windows
    )
    alarms = learn_alarms(learned, [node.name for node in plan.nodes])
    assert alarms is not None
    relation = alarms.relation
    print(f"excess = {relation.intercept:+.2f} {relation.slope:+.2f} x missed ± {relation.scatter:.2f}")
    print(f"correlation {relation.correlation:.2f} over {relation.n} pieces; {alarms.looked_at:.0%} pass the limits")
    for node in alarms.nodes:
        print(f"{node.name}: normal {node.normal:.3f}, broken {node.broken:.3f}, {node.limits}")

    reader, cutter = Reader(model, plan), Cutter(model, halved(domains, True))
    changing, alone = [], []
    for _ in range(options.sessions):
        for one in range(len(domains)):
            for other in range(len(domains)):
                if one != other:
                    tokens = np.concatenate([cutter.cut(one, HALF), cutter.cut(other, HALF)])
                    changing.append(follow(reader, alarms, tokens))
    for _ in range(options.still):
        alone += [follow(reader, alarms, cutter.cut(index, 2 * HALF)) for index in range(len(domains))]

    show_changing(changing)
    show_alone(alone)


if __name__ == "__main__":
    main()
