#include "moeshard/expert_mask.h"

#include <exception>
#include <optional>
#include <string>

#include "engine/control.hpp"
#include "moeshard/keep.hpp"

static thread_local std::string last_error;

int32_t llama_context_set_expert_mask(llama_context* ctx, int32_t seq_id, const uint8_t* keep, int32_t n_layer,
                                      int32_t n_expert) {
    try {
        std::optional<moeshard::Keep> mask;
        if (keep) mask.emplace(n_layer, n_expert, keep);
        moeshard::hook::set_mask(ctx, seq_id, mask ? &*mask : nullptr);
        return 0;
    } catch (const std::exception& error) {
        last_error = error.what();
        return -1;
    }
}

const char* llama_expert_mask_error(void) { return last_error.c_str(); }
