// What the patched call sites of llama.cpp call. Implemented in hook.cpp.
//
// A context that nobody attached to (see attach() in hook_state.hpp) builds the graphs that stock llama.cpp builds.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ggml-backend.h"

struct gguf_context;
struct llama_context;
struct llama_hparams;
struct llama_ubatch;
struct llm_graph_context;
class llm_graph_result;

namespace moeshard::hook {

struct State;

// Names the context whose graph is built and computed on this thread while this object lives.
class UbatchScope {
public:
    explicit UbatchScope(const llama_context* ctx);
    ~UbatchScope();
    UbatchScope(const UbatchScope&) = delete;
    UbatchScope& operator=(const UbatchScope&) = delete;

    // May `res`, built earlier, serve the masks and the trace that are wanted now?
    bool can_reuse(const llm_graph_result* res) const;
    // Hands the routing trace of a computed graph to whoever asked for it.
    void computed(const llm_graph_result* res, const llama_ubatch& ubatch, ggml_backend_sched_t sched) const;

private:
    State* outer_;
};

void context_freed(const llama_context* ctx);

// Calls `compute`, on behalf of whoever called llama.cpp's C function. What it throws passes to a caller that said it
// waits for it (see exceptions_pass() in control.hpp); for any other it is logged and becomes the status -3.
int32_t run(const std::function<int32_t()>& compute);

// Additive mask on the router's scores, F32 of the shape of `scores`: 0 keeps, -INF drops. Null without a hook. The
// gating function (an llama_expert_gating_func_type) and the bias of the selection (or null) are for the meter.
ggml_tensor* expert_mask(const llm_graph_context& graph, ggml_tensor* scores, int gating, ggml_tensor* bias, int il);

// Replaces the expert ids that a hash-routed layer looked up (null elsewhere) by kept ones.
ggml_tensor* hash_experts(const llm_graph_context& graph, ggml_tensor* selected, int il);

// Mark what a trace reads: router [n_expert, n_tokens] scores, ids and final weights of the chosen experts, and the
// chosen experts' outputs [n_embd, n_used, n_tokens] before they are weighted.
void trace_router(const llm_graph_context& graph, ggml_tensor* probs, ggml_tensor* ids, ggml_tensor* weights, int il);
void trace_experts(const llm_graph_context& graph, ggml_tensor* experts, int il);

// While tracing, rows without output stay in the last layer, so that its routing is seen for every token; they are
// dropped before the final norm instead.
bool defer_output_rows(const llm_graph_context& graph, ggml_tensor* out_ids);
ggml_tensor* drop_deferred_rows(const llm_graph_context& graph, ggml_tensor* cur, const ggml_tensor* norm);

// The shape that a model's tensor must have. That is `ne`, but in a shard whose layers hold different numbers of
// experts, which says so in its metadata, the axis of experts is as long as the layer's own number. Throws Error where
// the metadata is damaged.
std::vector<int64_t> own_shape(const gguf_context* metadata, const llama_hparams& hparams, const std::string& tensor,
                               const std::vector<int64_t>& ne);

}  // namespace moeshard::hook
