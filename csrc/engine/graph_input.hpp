// The inputs that masks add to a graph, and the tensors of it that a trace reads.
#pragma once

#include <vector>

#include "engine/hook_state.hpp"
#include "llama-graph.h"

namespace moeshard::hook {

class GraphInput : public llm_graph_input_i {
public:
    GraphInput(State& state, const llm_graph_context& graph);

    void set_input(const llama_ubatch* ubatch) override;
    // Whether the wanted trace is the one that was built is asked of built_for(); all else follows the graph's params.
    bool can_reuse(const llm_graph_params&) override { return true; }
    bool built_for(const State& now) const;

    // View [n_expert, n_rows] of the mask of one layer.
    ggml_tensor* mask(const llm_graph_context& graph, int64_t n_rows, int il);
    // I32 [n_used, n_rows]: what replaces the looked-up ids.
    ggml_tensor* hash_ids(const llm_graph_context& graph, ggml_tensor* selected, int il);

    struct Traced {
        int il = 0;
        ggml_tensor* ids = nullptr;
        ggml_tensor* weights = nullptr;
        ggml_tensor* probs = nullptr;
        ggml_tensor* squares = nullptr;  // sum of squares of each chosen expert's output
    };
    std::vector<Traced> traced;
    ggml_tensor* deferred_rows = nullptr;  // out_ids, until they are applied

private:
    // Rows of a layer are the tokens of the micro-batch, or only those with output.
    struct Mask {
        ggml_tensor* input = nullptr;  // the layers one after the other, each [n_expert, n_rows]
        ggml_tensor* on_device = nullptr;
        std::vector<int32_t> slots;  // that the graph reads
    };
    struct HashIds {
        ggml_tensor* input = nullptr;
        int il = 0;
    };

    std::vector<int32_t> rows(const llama_ubatch& ubatch, int64_t n_rows) const;
    void set_mask(const Mask& mask, const llama_ubatch& ubatch) const;
    void set_hash_ids(const HashIds& ids, const llama_ubatch& ubatch) const;

    State& state_;
    const int64_t n_tokens_;
    const int64_t n_outputs_;
    const bool tracing_;
    const TraceOptions options_;
    Mask of_tokens_;
    Mask of_outputs_;
    std::vector<HashIds> hashed_;
};

}  // namespace moeshard::hook
