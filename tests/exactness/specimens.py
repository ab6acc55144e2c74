"""The models that the exactness tests run on, and what of the pinned llama.cpp has none."""

from __future__ import annotations

# One per architecture that routes to experts; `zoo` makes them under the name that llama.cpp gives the architecture.
# fmt: off
ARCHITECTURES = (
    "afmoe", "arctic", "bailingmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "dbrx", "deepseek", "deepseek2",
    "deepseek2-ocr", "deepseek32", "deepseek4", "dots1", "dots3note", "ernie4_5-moe", "exaone-moe", "gemma4",
    "glm-dsa", "glm4moe", "glm5-next", "gpt-oss", "granite", "granite_swa", "granitehybrid", "granitemoe", "grok",
    "grovemoe", "hunyuan-moe", "hy_v3", "hy_v4", "jamba", "kimi-k3", "kimi-linear", "laguna", "lfm2moe", "llada-moe",
    "llama", "llama4", "maple", "mellum", "mimo2", "minicpm", "minimax-01", "minimax-m2", "minimax-m3", "mistral3",
    "mistral4", "nemotron_h", "nemotron_h_moe", "olmoe", "phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next",
    "qwen3vlmoe", "qwen4exp", "rnd1", "smallthinker", "step35",
)
# fmt: on

FUSED = "gate and up in one tensor"
NEXTN = "the last block predicts a further token"

# Other gatings, groupings, layouts and types, with what they show.
VARIANTS = {
    "bailingmoe2+grouped": "2 of 4 expert groups, sigmoid, selection bias",
    "cohere2moe+fused": FUSED,
    "deepseek2+fused": FUSED,
    "deepseek2+grouped": "2 of 4 expert groups, sigmoid, selection bias",
    "deepseek2+grouped-nobias": "2 of 4 expert groups, sigmoid",
    "deepseek2+grouped-softmax": "2 of 4 expert groups, softmax",
    "deepseek2+nobias": "sigmoid without selection bias, weights normalised and scaled",
    "deepseek2+softmax": "softmax, weights not normalised",
    "deepseek2+softmax-norm": "softmax, weights normalised",
    "deepseek2-ocr+fused": FUSED,
    "deepseek4+hash": "two layers that look experts up by token id",
    "gemma4+fused": FUSED,
    "glm4moe+nextn": NEXTN,
    "granite_swa+fused": FUSED,
    "grovemoe+chunks": "two experts share a chunk expert",
    "hy_v3+fused": FUSED,
    "hy_v3+nextn": NEXTN,
    "qwen35moe+fused": FUSED,
    "qwen3moe+f32": "experts in F32",
    "qwen3moe+q4_0": "experts in Q4_0",
    "qwen3moe+q8_0": "experts in Q8_0",
    "qwen3next+fused": FUSED,
    "qwen4exp+fused": FUSED,
    "step35+nextn": NEXTN,
}

# Fixtures that hold experts but are of no use in the table.
UNUSED = {
    "deepseek2+wide": "made for shards of every type",
    "nemotron_h_moe+own-numbers": "made for layers that use different numbers of experts",
    "llama-embed": "an embedding model: it has no logits to compare",
    "qwen3moe+4096-tokens": "made for routing statistics",
    "refact": "llama.cpp loads experts for it and never routes to them",
}

# Architectures with experts that have no specimen.
MISSING = {
    "dflash": "a draft model, which only runs beside the model that it drafts for",
    "nomic-bert-moe": "an embedding model: it has no logits to compare",
}

# Where llama.cpp's source file is not called as the architecture that routes through it.
SOURCES = {"bert": "nomic-bert-moe", "lfm2": "lfm2moe", "openai-moe": "gpt-oss", "phi3": "phimoe"}

# Attention is not causal here: llama.cpp computes a sequence only as a whole, in one micro-batch.
NOT_CAUSAL = ("llada-moe", "rnd1")

SPECIMENS = (*ARCHITECTURES, *VARIANTS)
