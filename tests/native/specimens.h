// The models that zoo can make: one per MoE architecture, and variants of some.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ggml.h"
#include "gguf.h"
#include "llama-arch.h"

constexpr uint32_t kExperts = 16;  // as extract_fixture.py sets it
constexpr uint32_t kExpertsUsed = 4;

struct specimen {
    std::string name;
    llm_arch arch;

    // Changes the metadata that llama.cpp's fixture has for this architecture.
    std::function<void(gguf_context *, const LLM_KV &)> adjust = nullptr;

    // Optional tensors whose names contain this are left out. (Models made in memory get every optional tensor.)
    std::string drop = {};

    // Keep ffn_gate_up_exps in one tensor, as it is made, instead of splitting it as most files have it.
    bool fused = false;

    // Mark the last block as one that predicts a further token, with the tensors that make it one.
    bool nextn = false;

    // Type of the expert tensors in the file. Rows of ffn_down_exps have 32 elements in most architectures.
    ggml_type experts = GGML_TYPE_F16;

    // Large ones drown what the layers add, so that each token's routing is independent of the others.
    float embedding_stdev = 0.1f;
};

std::vector<specimen> all_specimens();

// The weights of routed experts, or of GroveMoE's chunk experts.
bool is_expert_tensor(const std::string &name);
