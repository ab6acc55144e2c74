"""What the limits of `moeshard place` refuse, and what those sessions would have lost.

    moeshard analyze tinymoe -o profile.npz
    moeshard plan tinymoe --profile profile.npz --groups 4 --keep 32 -o plan.json
    python benchmarks/refusals.py plan.json [--windows N]

Held-out windows of 256 tokens are placed by their first 64 with the default limits; losses are nats per token of the
other 192 over the whole model, on the node that the probe finds, whether it is refused or not. Domains count alike.
"""

from __future__ import annotations

import argparse

import numpy as np

import moeshard
from moeshard.evaluation.losses import measure_losses
from moeshard.placement.decision import MIN_CAPTURED, MIN_QUALITY
from moeshard.placement.nodes import plan_nodes
from moeshard.placement.placement import planned_model
from moeshard.placement.probes import PROBES
from moeshard.traffic.domains import embedded_traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument("--windows", type=int, default=16, help="of held-out text per domain")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    plan = moeshard.read_plan(options.plan)
    model = moeshard.Model(planned_model(plan), n_threads=options.threads)
    keeps = [node.keep for node in plan.nodes]
    losses = measure_losses(
        model, keeps, embedded_traffic("heldout"), nodes=plan_nodes(model, plan), n_windows=options.windows
    )
    window = np.arange(losses.domain.size)
    prompt = slice(losses.n_prompt)
    quality = np.exp((losses.full[:, prompt] - losses.groups[:, :, prompt]).mean(axis=2, dtype=np.float64))
    limits = {
        "both": (quality * losses.captured, MIN_QUALITY * MIN_CAPTURED),
        "loss": (quality, MIN_QUALITY),
        "saliency": (losses.captured, MIN_CAPTURED),
    }
    print("| probe | refused | would have lost | the others lose | correlation with what is lost |")
    print("|---|---|---|---|---|")
    for probe in PROBES:
        node = losses.placement(probe)
        excess = losses.placed_losses(node) - losses.full_loss()
        goodness, least = limits[probe][0][node, window], limits[probe][1]
        refused = goodness < least
        parts = [f"{_mean(losses.domain, excess, rows):.2f}" if rows.any() else "" for rows in (refused, ~refused)]
        share = _mean(losses.domain, refused.astype(np.float64), np.ones_like(refused))
        correlation = np.corrcoef(-np.log(np.maximum(goodness, 1e-30)), excess)[0, 1]
        print(f"| {probe} | {share:.0%} | {' | '.join(parts)} | {correlation:.2f} |")


def _mean(domain: np.ndarray, values: np.ndarray, rows: np.ndarray) -> float:
    """Mean over some windows, each counting as much as its domain is small."""
    weights = rows / np.bincount(domain)[domain]
    return float((values * weights).sum() / weights.sum())


if __name__ == "__main__":
    main()
