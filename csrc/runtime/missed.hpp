// What tokens miss, as the engine measures it.
#pragma once

#include <vector>

#include "moeshard/model.hpp"

struct llama_context;

namespace moeshard {

// Of a sequence's tokens in the last decode; see Context::missed.
struct Missed {
    std::vector<float> mean;      // (n_tokens,)
    std::vector<float> by_layer;  // (n_tokens, n_layers)

    void clear();
    // A token's shares; NaN where a layer did not compute it.
    void add(const std::vector<float>& layers);
};

// Adds what is measured from now on to `missed`, by sequence; null ends that. A shard file brings its whole routers
// along, or nothing of it is measured.
void meter(llama_context* ctx, const Model& model, std::vector<Missed>* missed);

}  // namespace moeshard
