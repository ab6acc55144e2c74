// How the architectures of the pinned llama.cpp route, where their metadata does not say.
#pragma once

#include <string_view>

#include "moeshard/moe_layout.hpp"

namespace moeshard {

enum class Renormalise { kNo, kYes, kMetadata /* expert_weights_norm, no if absent */ };

struct GatingRule {
    std::string_view arch;
    bool from_metadata;  // expert_gating_func is read; otherwise it is ignored
    Gating gating;       // what is used if it is not read or absent; kNone: then the model cannot run
    Renormalise renormalise;
    Selection selection = Selection::kProbs;
};

// From load_arch_hparams and the calls of build_moe_ffn in src/models/*.cpp. An architecture that is not listed has
// no experts there, or loads them without routing to them.
inline constexpr GatingRule kGatingRules[] = {
    {"arctic", false, Gating::kSoftmax, Renormalise::kYes},
    {"bailingmoe", false, Gating::kSoftmax, Renormalise::kMetadata},
    {"dbrx", false, Gating::kSoftmax, Renormalise::kYes},
    {"deepseek", false, Gating::kSoftmax, Renormalise::kNo},
    {"ernie4_5-moe", false, Gating::kSoftmax, Renormalise::kYes},
    {"gemma4", false, Gating::kSoftmax, Renormalise::kYes},
    {"gpt-oss", false, Gating::kSoftmaxWeight, Renormalise::kNo},
    {"granite", false, Gating::kSoftmax, Renormalise::kYes},
    {"granite_swa", false, Gating::kSoftmax, Renormalise::kYes},
    {"granitehybrid", false, Gating::kSoftmax, Renormalise::kYes},
    {"granitemoe", false, Gating::kSoftmax, Renormalise::kYes},
    {"grok", false, Gating::kSoftmax, Renormalise::kYes},
    {"grovemoe", false, Gating::kSoftmax, Renormalise::kYes, Selection::kSigmoid},
    {"hunyuan-moe", false, Gating::kSoftmax, Renormalise::kYes},
    {"jamba", false, Gating::kSoftmax, Renormalise::kNo},
    {"llada-moe", false, Gating::kSoftmax, Renormalise::kNo},
    {"llama", false, Gating::kSoftmax, Renormalise::kYes},
    {"llama-embed", false, Gating::kSoftmax, Renormalise::kYes},
    {"llama4", false, Gating::kSigmoid, Renormalise::kNo, Selection::kLogits},
    {"maple", false, Gating::kSoftmax, Renormalise::kYes},
    {"mellum", false, Gating::kSoftmax, Renormalise::kYes},
    {"mimo2", false, Gating::kSigmoid, Renormalise::kYes},
    {"minicpm", false, Gating::kSoftmax, Renormalise::kYes},
    {"minimax-01", false, Gating::kSoftmax, Renormalise::kYes},
    {"mistral3", false, Gating::kSoftmax, Renormalise::kYes},
    {"nemotron_h", false, Gating::kSigmoid, Renormalise::kMetadata},
    {"nemotron_h_moe", false, Gating::kSigmoid, Renormalise::kMetadata},
    {"nomic-bert-moe", false, Gating::kSoftmax, Renormalise::kNo},
    {"olmoe", false, Gating::kSoftmax, Renormalise::kNo},
    {"phi3", false, Gating::kSoftmax, Renormalise::kYes},
    {"phimoe", false, Gating::kSoftmax, Renormalise::kYes},
    {"qwen2moe", false, Gating::kSoftmax, Renormalise::kNo},
    {"qwen35moe", false, Gating::kSoftmax, Renormalise::kYes},
    {"qwen3moe", false, Gating::kSoftmax, Renormalise::kYes},
    {"qwen3next", false, Gating::kSoftmax, Renormalise::kYes},
    {"qwen3vlmoe", false, Gating::kSoftmax, Renormalise::kYes},
    {"qwen4exp", false, Gating::kSoftmax, Renormalise::kYes},
    {"rnd1", false, Gating::kSoftmax, Renormalise::kYes},

    {"afmoe", true, Gating::kSigmoid, Renormalise::kMetadata},
    {"bailingmoe2", true, Gating::kNone, Renormalise::kMetadata},
    {"bailingmoe3", true, Gating::kNone, Renormalise::kMetadata},
    {"cohere2moe", true, Gating::kSigmoid, Renormalise::kMetadata},
    {"deepseek2", true, Gating::kSoftmax, Renormalise::kMetadata},
    {"deepseek2-ocr", true, Gating::kSoftmax, Renormalise::kMetadata},
    {"deepseek32", true, Gating::kNone, Renormalise::kMetadata},
    {"deepseek4", true, Gating::kNone, Renormalise::kMetadata},
    {"dflash", true, Gating::kNone, Renormalise::kMetadata},
    {"dots1", true, Gating::kNone, Renormalise::kMetadata},
    {"dots3note", true, Gating::kNone, Renormalise::kMetadata},
    {"exaone-moe", true, Gating::kNone, Renormalise::kMetadata},
    {"glm-dsa", true, Gating::kSigmoid, Renormalise::kMetadata},
    {"glm4moe", true, Gating::kSigmoid, Renormalise::kMetadata},
    {"glm5-next", true, Gating::kSigmoid, Renormalise::kMetadata},
    {"hy_v3", true, Gating::kSigmoid, Renormalise::kMetadata},
    {"hy_v4", true, Gating::kNone, Renormalise::kMetadata},
    {"kimi-k3", true, Gating::kNone, Renormalise::kMetadata},
    {"kimi-linear", true, Gating::kNone, Renormalise::kYes},
    {"laguna", true, Gating::kSigmoid, Renormalise::kMetadata},
    {"lfm2moe", true, Gating::kNone, Renormalise::kYes},
    {"minimax-m2", true, Gating::kNone, Renormalise::kYes},
    {"minimax-m3", true, Gating::kNone, Renormalise::kMetadata},
    {"mistral4", true, Gating::kSoftmax, Renormalise::kMetadata},
    {"smallthinker", true, Gating::kNone, Renormalise::kYes},
    {"step35", true, Gating::kSigmoid, Renormalise::kMetadata},
};

}  // namespace moeshard
