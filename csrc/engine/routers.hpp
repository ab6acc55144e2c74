// The whole routers of a shard, which has only its own experts' rows: for the meter.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "engine/control.hpp"
#include "ggml-cpp.h"

struct llama_model;

namespace moeshard::hook {

class Routers {
public:
    // Copies the weights to where the shard's own routers are. Throws Error where they do not fit the model.
    Routers(const llama_model& model, std::vector<WholeRouter> routers);

    struct Layer {
        ggml_tensor* weight = nullptr;  // [n_embd, n_expert]
        std::vector<float> bias;
        std::vector<float> selection_bias;
        std::vector<uint8_t> keep;
    };
    // Null where nothing is known of a layer.
    const Layer* find(int32_t layer) const;

private:
    std::map<int32_t, Layer> layers_;
    ggml_context_ptr context_;
    std::vector<ggml_backend_buffer_ptr> buffers_;
};

}  // namespace moeshard::hook
