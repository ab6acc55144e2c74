// What moeshard remembers about a llama_context: the masks of its sequences and whether its routing is traced.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "engine/control.hpp"
#include "engine/routers.hpp"
#include "moeshard/keep.hpp"
#include "moeshard/trace.hpp"

struct ggml_tensor;
struct llama_context;
struct llama_model;

namespace moeshard::hook {

class GraphInput;

// A keep as the graph adds it: 0 or -INF per expert, the MoE layers one after the other, each as long as it has
// experts.
struct MaskRows {
    explicit MaskRows(const Keep& keep, const Routing& routing);

    Keep keep;
    std::vector<float> rows;
};

struct State {
    State(const llama_model& model, Routing routing);

    const llama_model& model;
    Routing routing;
    std::vector<int32_t> slot_of_layer;  // index among the MoE layers, -1 for the others
    int32_t n_slots = 0;
    std::vector<size_t> slot_begin{0};  // experts of the MoE layers before it; one more than slots
    bool offloaded = false;             // some layers run on another device than the CPU

    bool masked = false;  // a keep was set once: from then on graphs carry a mask
    std::shared_ptr<const MaskRows> mask_of_all;
    std::map<int32_t, std::shared_ptr<const MaskRows>> mask_of_seq;
    const MaskRows* mask(int32_t seq) const;
    // Of the masks in use, equal ones counted once.
    size_t n_masks() const;
    // One that says the same, or null: sequences of one keep then share it.
    std::shared_ptr<const MaskRows> find(const Keep& keep) const;

    const ggml_tensor* final_norm = nullptr;  // its weight

    bool tracing = false;
    TraceOptions trace;
    TraceSink sink;

    bool metered = false;
    MissedSink missed;
    std::shared_ptr<const Routers> routers;  // of a shard; null where they are not known
    bool measures() const { return metered && (masked || routers); }

    // The rows of tid2eid tables (n_vocab, n_used) of hash-routed layers, fetched when first needed.
    std::map<int32_t, std::vector<int32_t>> hash_tables;

    // The biases of layers that choose with one, fetched when first needed.
    std::map<int32_t, std::vector<float>> biases;
    const std::vector<float>& bias(int32_t layer, const ggml_tensor* tensor);

    GraphInput* building = nullptr;  // of the graph that is being built, once it routes something
};

// The state of `ctx`, made on first use; it goes away with the context.
State& attach(llama_context* ctx);

}  // namespace moeshard::hook
