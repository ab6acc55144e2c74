"""How fast `moeshard analyze` reads, against a plain prefill of the same tokens in the same run.

    python benchmarks/analyze_speed.py [MODEL...]     # by default the embedded one

`moeshard.analyze` as a user calls it, with everything on, is timed right beside each of two prefills that read the same
sequences in the same batches:

- *last*: logits of each sequence's last token, what llama.cpp does when it prefills. It leaves out the last layer's
  experts for all other tokens, which an analysis has to see.
- *all*: logits of all tokens, so that every layer computes every token, as an analysis does, and the vocabulary's
  projection besides.

Printed is plain time / analysis time, 1.00 being free: the median over pairs, its 95 % bootstrap interval, and the
range of the pairs; in CPU time, for which neighbours on the machine matter less, and in wall time.
"""

from __future__ import annotations

import argparse

import numpy as np
from engine_cost import Run, median_interval, paired_seconds

import moeshard
from moeshard.profile.measure import analyze, batch_sequences
from moeshard.traffic.domains import embedded_traffic
from moeshard.traffic.embedded import resolve_model
from moeshard.traffic.windows import default_window, sequences


def measure(path: str, rounds: int, n_tokens: int, n_domains: int, n_threads: int) -> None:
    model = moeshard.Model(resolve_model(path), n_threads=n_threads)
    domains = embedded_traffic("calibration")[:n_domains]
    window = default_window(model)
    per_batch = batch_sequences(window)
    texts = [sequences(model, domain, window, n_tokens) for domain in domains]
    total = sum(len(tokens) for text in texts for tokens in text)

    def prefill(outputs: str) -> Run:
        def run() -> None:
            with model.session(n_seq=per_batch, n_ctx=window) as session:
                for text in texts:
                    for at in range(0, len(text), per_batch):
                        session.reset()
                        session.decode(dict(enumerate(text[at : at + per_batch])), outputs)

        return run

    def analysis() -> None:
        profile = analyze(model, domains, n_tokens=n_tokens)
        assert profile.n_tokens.sum() == total

    print(f"{path}: {model.description}, {len(model.moe_layers)} MoE layers, {total} tokens, {rounds} rounds")
    for outputs in ("last", "all"):
        times = paired_seconds(prefill(outputs), analysis, rounds)
        speed = total / np.median(times[:, :, 1], axis=0)
        print(f"  prefill, {outputs} logits: {speed[0]:.0f} tokens/s; analysis: {speed[1]:.0f} tokens/s")
        for clock, name in enumerate(("CPU", "wall")):
            ratios = times[:, 0, clock] / times[:, 1, clock]
            median, low, high = median_interval(ratios)
            pairs = f"pairs {ratios.min():.3f} to {ratios.max():.3f}"
            print(f"    {name:4} {median:.3f}  [{low:.3f}, {high:.3f}]  {pairs}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["tinymoe"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=4096, help="of each domain")
    parser.add_argument("--domains", type=int, default=4, help="of the embedded calibration texts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for path in args.models:
        measure(path, args.rounds, args.tokens, args.domains, args.threads)


if __name__ == "__main__":
    main()
