"""Two machines that share a model: profile, plan, split, and load what each of them holds.

python examples/two_nodes.py [MODEL.gguf] [-o FOLDER]
"""

import argparse
from pathlib import Path

import moeshard

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", type=Path)
parser.add_argument("-o", "--out", type=Path, default=Path("two-nodes"))
arguments = parser.parse_args()
model = moeshard.Model(arguments.model or moeshard.embedded_model())

# What the traffic needs. Here the package's own texts; moeshard.read_texts reads yours.
profile = moeshard.analyze(model, moeshard.embedded_traffic("calibration"), n_tokens=1000)

# Half of the experts for each: islands, so that each is good at some of the traffic.
plan = moeshard.make_plan(model.path, profile, n_keep=[model.n_expert // 2] * 2)
arguments.out.mkdir(exist_ok=True)
plan.write(arguments.out / "plan.json", force=True)
for node in plan.nodes:
    captured = node.facts["captured"]
    print(f"{node.name} is best at {max(captured, key=captured.get)}, of which it holds {max(captured.values()):.0%}")

# Each node is given its file. Any llama.cpp loads it.
for shard in moeshard.split(model.path, plan, arguments.out, force=True):
    checked = moeshard.verify(shard.paths[0], model.path)
    share = shard.bytes / Path(model.path).stat().st_size
    held = f"{checked.n_expert} of {checked.n_expert_source} experts"
    print(f"{shard.paths[0]}: {held}, {share:.0%} of the bytes, verified")

    # What runs on that node.
    node_model = moeshard.Model(shard.paths[0])
    print("   ", repr("".join(node_model.generate("The package manager of Debian", max_tokens=16, temperature=0))))
