"""Which experts do my chats use? Measures a profile of chat logs, and says whether it can be relied on.

    python examples/profile_my_chats.py [MODEL.gguf] CHATS.jsonl... -o profile.npz

A file is a domain; each of its lines is a conversation: {"messages": [{"role": "user", "content": "..."}, ...]}.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import moeshard

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
parser.add_argument("-o", "--out", type=Path, default=Path("profile.npz"))
arguments = parser.parse_args()

chats = [path for path in arguments.files if path.suffix != ".gguf"]
models = [path for path in arguments.files if path.suffix == ".gguf"]
model = moeshard.Model(models[0] if models else moeshard.embedded_model())

# With a model that brings a chat template, this is moeshard.read_texts([], chats, model=model). The embedded one has
# none, so a template is named: experts are chosen by every token of a prompt, those of the template too.
domains = []
for path in chats:
    conversations = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines() if line]
    texts = [model.chat_prompt(messages, template="chatml", answer=False) for messages in conversations]
    domains.append(moeshard.Domain(path.stem, tuple(texts)))

profile = moeshard.analyze(model, domains)
profile.save(arguments.out, force=True)
print(f"{int(profile.n_tokens.sum())} tokens of {len(profile.n_tokens)} conversations: {arguments.out}")

# Saliency: what an expert adds to the layer's output, weight times norm, summed over tokens.
for name in profile.domains:
    saliency = profile.total("saliency", [name])
    share = np.sort(saliency / saliency.sum(axis=1, keepdims=True), axis=1)[:, ::-1]
    quarter = share[:, : profile.n_expert // 4].sum(axis=1)
    print(f"{name}: a quarter of the experts has {quarter.mean():.0%} of the saliency (mean over layers)")
