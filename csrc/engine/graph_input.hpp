// The inputs that masks add to a graph, and the tensors of it that a trace reads.
#pragma once

#include <map>
#include <vector>

#include "engine/hook_state.hpp"
#include "engine/meter.hpp"
#include "llama-graph.h"

namespace moeshard::hook {

class GraphInput : public llm_graph_input_i {
public:
    GraphInput(State& state, const llm_graph_context& graph);

    void set_input(const llama_ubatch* ubatch) override;
    // Whether the wanted trace is the one that was built is asked of built_for(); all else follows the graph's params.
    bool can_reuse(const llm_graph_params&) override { return true; }
    bool built_for(const State& now) const;
    bool masked() const { return masked_; }

    // [n_expert, n_rows]: the mask of one layer; null where no keep was ever set.
    ggml_tensor* mask(const llm_graph_context& graph, int64_t n_rows, int il);
    // I32 [n_used, n_rows]: what replaces the looked-up ids.
    ggml_tensor* hash_ids(const llm_graph_context& graph, ggml_tensor* selected, int il);

    // Marks a layer's router to be read, where the meter is on.
    void meter(const llm_graph_context& graph, ggml_tensor* logits, int gating, ggml_tensor* bias, int il);
    // Hands what the tokens of the computed graph missed to whoever asked for it.
    void read_metered(const llama_ubatch& ubatch, ggml_backend_sched_t sched) const;

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
    // The masks that the sequences use, which are few, once each: the layers one after the other, each
    // [n_expert, capacity]. Row 0 keeps all experts.
    struct Table {
        ggml_tensor* input = nullptr;
        ggml_tensor* on_device = nullptr;
    };
    // Rows of a layer are the tokens of the micro-batch, or only those with output.
    struct Rows {
        int64_t n = 0;
        ggml_tensor* index = nullptr;   // I32 [n]: the row of the table of each
        ggml_tensor* direct = nullptr;  // where there are few rows: the layers one after the other, each [n_expert, n]
        ggml_tensor* on_device = nullptr;  // of `direct`
        std::vector<int32_t> slots;        // that the graph reads
    };
    // A layer's router, as the meter reads it.
    struct Metered {
        int il = 0;
        ggml_tensor* logits = nullptr;  // [n_expert, n_rows], before any mask
        ggml_tensor* bias = nullptr;
        const Routers::Layer* whole = nullptr;  // that the logits are of, instead of the model's own
        Gate gate;                              // but for the bias
    };
    struct HashIds {
        ggml_tensor* input = nullptr;
        int il = 0;
    };

    static std::vector<int32_t> tokens_of(const llama_ubatch& ubatch, int64_t n_rows);
    ggml_tensor* layer_view(const llm_graph_context& graph, ggml_tensor* of, int64_t n_rows, int32_t slot) const;
    ggml_tensor* on_device(const llm_graph_context& graph, ggml_tensor* input) const;
    void set_table();
    void set_index(const Rows& rows, const llama_ubatch& ubatch) const;
    void set_direct(const Rows& rows, const llama_ubatch& ubatch) const;
    void set_hash_ids(const HashIds& ids, const llama_ubatch& ubatch) const;

    State& state_;
    const int64_t n_tokens_;
    const int64_t n_outputs_;
    const bool tracing_;
    const TraceOptions options_;
    const bool masked_;
    const bool metered_;
    const int64_t capacity_;  // masks that the table has room for, row 0 not counted
    Table table_;
    std::map<const MaskRows*, int32_t> row_of_;
    Rows of_tokens_;
    Rows of_outputs_;
    std::vector<HashIds> hashed_;
    std::vector<Metered> metered_layers_;
};

}  // namespace moeshard::hook
