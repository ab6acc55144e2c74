"""A session is placed on the node that serves it best, by one prefill of its prompt, and answered there.

    python examples/two_nodes.py -o FOLDER
    python examples/place_then_answer.py FOLDER/plan.json "A prompt of at least 16 tokens" ...

Nodes are masks on one model here. With shards on machines of their own, send the prompt to `placed.node` instead.
"""

import sys

import moeshard

placement = moeshard.Placement(sys.argv[1])  # the plan names its model
keeps = {node.name: node.keep for node in placement.plan.nodes}

for prompt in sys.argv[2:]:
    placed = placement.place(prompt)
    print(f"{prompt!r}: {placed.reason}")
    if placed.node is None:
        where, keep = "the whole model", None  # no node is good enough: that is an answer too
    elif placed.clear:
        where, keep = placed.node, keeps[placed.node]
    else:
        where = placed.candidates[-1]  # too close to call: any of these may have it, say the one with least load
        keep = keeps[where]
    answer = placement.model.generate(prompt, keep, max_tokens=24, temperature=0)
    print(f"    {where}: {''.join(answer)!r}")
