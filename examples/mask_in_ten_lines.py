"""A mask: one loaded model, with all of its experts and with half of them.

python examples/mask_in_ten_lines.py [MODEL.gguf]
"""

import sys

import numpy as np

import moeshard

model = moeshard.Model(sys.argv[1] if len(sys.argv) > 1 else moeshard.embedded_model())
tokens = model.tokenize("The package manager of Debian installs, upgrades and removes packages.")
keep = np.zeros((model.n_layer, model.n_expert), dtype=bool)  # which experts may be chosen, layer by layer
keep[:, : model.n_expert // 2] = True
for name, mask in {"all experts": None, "the first half": keep}.items():
    chosen = model.trace(tokens, mask).ids
    print(f"{name}: experts {chosen.min()} to {chosen.max()} of {model.n_expert} were chosen")
    print("   ", repr("".join(model.generate("The package manager of Debian", mask, max_tokens=16, temperature=0))))
change = np.abs(model.logits(tokens, keep) - model.logits(tokens)).max()
print(f"the mask moves logits by up to {change:.2f}")
