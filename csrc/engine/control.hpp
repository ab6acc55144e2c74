// What the runtime asks of the engine room without seeing llama.cpp's private headers.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "moeshard/keep.hpp"
#include "moeshard/memory.hpp"
#include "moeshard/trace.hpp"

struct llama_context;
struct llama_model;

namespace moeshard::hook {

// What one masked token missed in each of the MoE layers, (n_slots); NaN where a layer did not compute it.
using MissedSink = std::function<void(int32_t seq, int32_t pos, const std::vector<float>& missed)>;

// Whether exceptions may pass through calls of llama.cpp on this thread: where C++ that expects them made the call.
// Returns what was so before.
bool exceptions_pass(bool pass);

Routing routing_of(const llama_model& model);

// Masks sequence `seq` of `ctx` (all sequences without a mask of their own: seq < 0) from the next decode on; null
// clears. Throws Error where the keep does not fit the model.
void set_mask(llama_context* ctx, int32_t seq, const Keep* keep);

// Hands the routing of every micro-batch to `sink` until stop_trace. An Error thrown by the sink ends the decode.
void start_trace(llama_context* ctx, const TraceOptions& options, TraceSink sink);
void stop_trace(llama_context* ctx);

// A layer's router before a shard was taken of it.
struct WholeRouter {
    int32_t layer = 0;
    std::vector<uint8_t> weight;        // in the type of the shard's own router
    std::vector<float> bias;            // of the logits; may be empty
    std::vector<float> selection_bias;  // may be empty
    std::vector<uint8_t> keep;          // which experts the shard holds
};
// Without masks, what tokens miss is measured by these, given once. They take no part in what is computed.
void set_routers(llama_context* ctx, std::vector<WholeRouter> routers);
bool has_routers(llama_context* ctx);

// Measures what masked tokens miss, see missed_share(), in every micro-batch and hands it to `sink`; null ends that.
void set_meter(llama_context* ctx, MissedSink sink);

// Prepares `ctx` for masks, so that its first one rebuilds nothing.
void enable_masks(llama_context* ctx);

// What `ctx` and its model have allocated, or would have for a model that only simulates it. All devices together.
MemoryUse memory_of(const llama_context* ctx);

}  // namespace moeshard::hook
