// A program written against llama.cpp's own C API, plus the one function that moeshard adds to it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ggml.h"
#include "llama.h"
#include "moeshard/context.hpp"
#include "moeshard/expert_mask.h"

namespace {

std::vector<float> last_logits(llama_context* ctx, const std::vector<llama_token>& tokens) {
    llama_memory_clear(llama_get_memory(ctx), true);
    std::vector<llama_token> copy = tokens;
    if (llama_decode(ctx, llama_batch_get_one(copy.data(), static_cast<int32_t>(copy.size()))) != 0) std::abort();
    const float* logits = llama_get_logits_ith(ctx, -1);
    return {logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)))};
}

int32_t number(const llama_model* model, const char* key) {
    char arch[64];
    char value[64];
    if (llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch)) < 0) std::abort();
    if (llama_model_meta_val_str(model, (std::string(arch) + key).c_str(), value, sizeof(value)) < 0) std::abort();
    return std::atoi(value);
}

int n_logged = 0;
void own_log(ggml_log_level, const char*, void*) { ++n_logged; }
void own_abort(const char*) {}

bool check(bool ok, const char* what) {
    std::printf("%s: %s\n", ok ? "ok" : "FAILED", what);
    return ok;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }
    llama_log_set(own_log, nullptr);
    ggml_set_abort_callback(own_abort);
    llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 64;
    llama_context* ctx = llama_init_from_model(model, params);
    if (!ctx) return 1;

    const int32_t n_layer = number(model, ".block_count");
    const int32_t n_expert = number(model, ".expert_count");
    std::vector<uint8_t> keep(static_cast<size_t>(n_layer) * static_cast<size_t>(n_expert), 0);
    for (size_t i = 0; i < keep.size(); i += 2) keep[i] = 1;
    const std::vector<llama_token> tokens = {1, 2, 3, 4, 5, 6, 7, 8};

    const auto plain = last_logits(ctx, tokens);
    bool ok = check(llama_context_set_expert_mask(ctx, -1, keep.data(), n_layer, n_expert) == 0, "a mask is taken");
    ok &= check(last_logits(ctx, tokens) != plain, "it changes the logits");
    ok &= check(llama_context_set_expert_mask(ctx, -1, keep.data(), n_layer, n_expert / 2) == -1,
                "another shape is refused");
    std::printf("    %s\n", llama_expert_mask_error());
    ok &= check(llama_context_set_expert_mask(ctx, -1, nullptr, 0, 0) == 0, "the mask is cleared");
    ok &= check(last_logits(ctx, tokens) == plain, "the logits are bit for bit what they were");

    {
        // Using the library from C++ too takes nothing from the program that it did not give.
        moeshard::ContextParams small;
        small.n_ctx = 64;
        moeshard::Context beside(moeshard::Model::load(argv[1]), small);
        beside.decode({{0, tokens.data(), tokens.size()}});
    }
    ggml_log_callback log = nullptr;
    void* data = nullptr;
    llama_log_get(&log, &data);
    ok &= check(log == own_log && n_logged > 0, "the log is still the program's");
    ok &= check(ggml_set_abort_callback(own_abort) == own_abort, "and so is what is called on an abort");

    llama_free(ctx);
    llama_model_free(model);
    return ok ? 0 : 1;
}
