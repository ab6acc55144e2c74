#include "specimens.h"

#include <regex>

#include "llama-hparams.h"

namespace {

using adjust_fn = std::function<void(gguf_context *, const LLM_KV &)>;

void set(gguf_context *ctx, const LLM_KV &key, llm_kv kv, uint32_t value) {
    gguf_set_val_u32(ctx, key(kv).c_str(), value);
}

adjust_fn gating(llama_expert_gating_func_type func, bool norm, float scale) {
    return [=](gguf_context *ctx, const LLM_KV &key) {
        set(ctx, key, LLM_KV_EXPERT_GATING_FUNC, func);
        gguf_set_val_bool(ctx, key(LLM_KV_EXPERT_WEIGHTS_NORM).c_str(), norm);
        gguf_set_val_f32(ctx, key(LLM_KV_EXPERT_WEIGHTS_SCALE).c_str(), scale);
    };
}

adjust_fn grouped(llama_expert_gating_func_type func) {
    return [=](gguf_context *ctx, const LLM_KV &key) {
        gating(func, true, 2.5f)(ctx, key);
        set(ctx, key, LLM_KV_EXPERT_GROUP_COUNT, 4);
        set(ctx, key, LLM_KV_EXPERT_GROUP_USED_COUNT, 2);
    };
}

void hash_routed(gguf_context *ctx, const LLM_KV &key) {
    constexpr uint32_t kHashLayers = 2;
    set(ctx, key, LLM_KV_HASH_LAYER_COUNT, kHashLayers);
    for (uint32_t il = 0; il < kHashLayers; il++) {
        // llama_model_init_from_user takes types, and nothing else, from the tensors listed here.
        ggml_tensor info = {};
        info.type = GGML_TYPE_I32;
        ggml_format_name(&info, "blk.%u.ffn_gate_tid2eid.weight", il);
        gguf_add_tensor(ctx, &info);
    }
}

// That of the published models. The fixture's 1 makes the logits of GroveMoE alone several times as sensitive to
// rounding as those of all others.
void grove_scale(gguf_context *ctx, const LLM_KV &key) {
    gguf_set_val_f32(ctx, key(LLM_KV_EXPERT_GROUP_SCALE).c_str(), 0.05f);
}

void grove_chunks(gguf_context *ctx, const LLM_KV &key) {
    grove_scale(ctx, key);
    set(ctx, key, LLM_KV_EXPERTS_PER_GROUP, 2);
    set(ctx, key, LLM_KV_EXPERT_CHUNK_FEED_FORWARD_LENGTH, 32);
}

// As the published models with layers that use different numbers of experts: a list. The fixture has one such layer,
// the third.
void own_numbers(gguf_context *ctx, const LLM_KV &key) {
    constexpr uint32_t n_layer = 5;
    for (const llm_kv kv : {LLM_KV_FEED_FORWARD_LENGTH, LLM_KV_ATTENTION_HEAD_COUNT, LLM_KV_ATTENTION_HEAD_COUNT_KV}) {
        const int64_t at = gguf_find_key(ctx, key(kv).c_str());
        const auto *old = static_cast<const uint32_t *>(gguf_get_arr_data(ctx, at));
        std::vector<uint32_t> values(old, old + gguf_get_arr_n(ctx, at));
        values.resize(n_layer, values.back());
        gguf_set_arr_data(ctx, key(kv).c_str(), GGUF_TYPE_UINT32, values.data(), n_layer);
    }
    const uint32_t used[n_layer] = {0, 0, 2, 4, 3};
    gguf_set_arr_data(ctx, key(LLM_KV_EXPERT_USED_COUNT).c_str(), GGUF_TYPE_UINT32, used, n_layer);
    set(ctx, key, LLM_KV_BLOCK_COUNT, n_layer);
}

// Rows of experts that hold a whole block of any type.
void wide(gguf_context *ctx, const LLM_KV &key) {
    set(ctx, key, LLM_KV_EMBEDDING_LENGTH, 256);
    set(ctx, key, LLM_KV_EXPERT_FEED_FORWARD_LENGTH, 256);
}

// Routing statistics need more distinct tokens than the 128 of the fixture.
void many_tokens(gguf_context *ctx, const LLM_KV &key) {
    constexpr uint32_t kVocab = 4096;
    std::vector<std::string> names(kVocab);
    std::vector<const char *> list(kVocab);
    std::vector<float> scores(kVocab, 0.0f);
    for (uint32_t i = 0; i < kVocab; i++) {
        names[i] = "tok_" + std::to_string(i);
        list[i] = names[i].c_str();
    }
    set(ctx, key, LLM_KV_VOCAB_SIZE, kVocab);
    gguf_set_arr_str(ctx, key(LLM_KV_TOKENIZER_LIST).c_str(), list.data(), kVocab);
    gguf_set_arr_data(ctx, key(LLM_KV_TOKENIZER_SCORES).c_str(), GGUF_TYPE_FLOAT32, scores.data(), kVocab);
}

// Architectures whose fixture lacks something, or that need more to be routed at all.
adjust_fn basics(llm_arch arch) {
    if (arch == LLM_ARCH_GEMMA4) {
        return [](gguf_context *ctx, const LLM_KV &key) {
            const uint32_t windowed[] = {1, 1, 1, 1, 0};
            gguf_set_arr_data(ctx, key(LLM_KV_ATTENTION_SLIDING_WINDOW_PATTERN).c_str(), GGUF_TYPE_UINT32, windowed, 5);
        };
    }
    if (arch == LLM_ARCH_GROVEMOE) {
        return grove_scale;
    }
    return nullptr;
}

}  // namespace

bool is_expert_tensor(const std::string &name) {
    static const std::regex pattern("ffn_(gate|up|down|gate_up)_(ch)?exps\\.weight$");
    return std::regex_search(name, pattern);
}

std::vector<specimen> all_specimens() {
    constexpr auto kSoftmax = LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX;
    constexpr auto kSigmoid = LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID;

    std::vector<specimen> out;
    for (llm_arch arch : llm_arch_all()) {
        if (arch != LLM_ARCH_UNKNOWN) {
            out.push_back({llm_arch_name(arch), arch, basics(arch)});
        }
    }
    const std::string bias = "exp_probs_b";
    out.push_back({"deepseek2+grouped", LLM_ARCH_DEEPSEEK2, grouped(kSigmoid)});
    out.push_back({"deepseek2+grouped-nobias", LLM_ARCH_DEEPSEEK2, grouped(kSigmoid), bias});
    out.push_back({"deepseek2+grouped-softmax", LLM_ARCH_DEEPSEEK2, grouped(kSoftmax), bias});
    out.push_back({"deepseek2+nobias", LLM_ARCH_DEEPSEEK2, gating(kSigmoid, true, 2.5f), bias});
    out.push_back({"deepseek2+softmax", LLM_ARCH_DEEPSEEK2, gating(kSoftmax, false, 1.0f), bias});
    out.push_back({"deepseek2+softmax-norm", LLM_ARCH_DEEPSEEK2, gating(kSoftmax, true, 1.0f), bias});
    out.push_back({"deepseek2+wide", LLM_ARCH_DEEPSEEK2, wide});
    // Every architecture of the pin that reads gate and up from one tensor.
    for (llm_arch arch :
         {LLM_ARCH_COHERE2MOE, LLM_ARCH_DEEPSEEK2, LLM_ARCH_DEEPSEEK2OCR, LLM_ARCH_GEMMA4, LLM_ARCH_GRANITE_SWA,
          LLM_ARCH_HY_V3, LLM_ARCH_QWEN35MOE, LLM_ARCH_QWEN3NEXT, LLM_ARCH_QWEN4EXP}) {
        out.push_back({std::string(llm_arch_name(arch)) + "+fused", arch, basics(arch), "", true});
    }
    // llama.cpp leaves such a block of the first in the file, and loads those of the others, but computes none.
    for (llm_arch arch : {LLM_ARCH_GLM4_MOE, LLM_ARCH_HY_V3, LLM_ARCH_STEP35}) {
        specimen what = {std::string(llm_arch_name(arch)) + "+nextn", arch, basics(arch)};
        what.nextn = true;
        out.push_back(what);
    }
    out.push_back({"deepseek4+hash", LLM_ARCH_DEEPSEEK4, hash_routed});
    out.push_back({"bailingmoe2+grouped", LLM_ARCH_BAILINGMOE2, grouped(kSigmoid)});
    out.push_back({"grovemoe+chunks", LLM_ARCH_GROVEMOE, grove_chunks});
    out.push_back({"nemotron_h_moe+own-numbers", LLM_ARCH_NEMOTRON_H_MOE, own_numbers});
    out.push_back({"qwen3moe+f32", LLM_ARCH_QWEN3MOE, nullptr, "", false, false, GGML_TYPE_F32});
    out.push_back({"qwen3moe+q8_0", LLM_ARCH_QWEN3MOE, nullptr, "", false, false, GGML_TYPE_Q8_0});
    out.push_back({"qwen3moe+q4_0", LLM_ARCH_QWEN3MOE, nullptr, "", false, false, GGML_TYPE_Q4_0});
    out.push_back({"qwen3moe+4096-tokens", LLM_ARCH_QWEN3MOE, many_tokens, "", false, false, GGML_TYPE_F16, 1.0f});
    return out;
}
