// What a keep makes a token miss: of the weight that its router would have given out, had nothing been dropped, the
// share of experts that are not kept.
#pragma once

#include <cstdint>
#include <vector>

#include "moeshard/keep.hpp"

namespace moeshard::hook {

// How a layer turns its router's logits into chosen experts and their weights, up to a factor that all of them share.
struct Gate {
    enum class Function { kSoftmax, kSigmoid, kSqrtSoftplus };

    Function function = Function::kSoftmax;
    std::vector<float> bias;  // (n_expert), added for the selection only; may be empty
    int32_t n_used = 0;
    int32_t n_group = 1;
    int32_t n_group_used = 1;
};

// Scratch memory of missed_share().
struct GateScratch {
    std::vector<float> scores;
    std::vector<int32_t> order;
};

// The share, from 0 to 1, of one token in one layer. `logits` are the router's for all `n_expert` experts, `keep` says
// which of them are there. `ids` are the n_used experts of a layer that does not choose by its scores, else null.
float missed_share(const float* logits, int32_t n_expert, const Gate& gate, const uint8_t* keep, const int32_t* ids,
                   GateScratch& scratch);

}  // namespace moeshard::hook
