// Which tensors of a model depend on its experts, and how. Found by rule, from names, shapes and metadata; a tensor
// for which the rules do not decide is an Error, because a shard that guesses is a broken model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "moeshard/gguf.hpp"
#include "moeshard/keep.hpp"

namespace moeshard {

// How router logits become weights. The numbers are those of the metadata key expert_gating_func.
enum class Gating : uint32_t {
    kNone = 0,  // nothing is routed, or the pinned llama.cpp does not know the architecture
    kSoftmax = 1,
    kSigmoid = 2,
    kSoftmaxWeight = 3,  // softmax over the chosen experts only
    kSqrtSoftplus = 4,
};

// What the experts are chosen by (before a selection bias is added).
enum class Selection : uint32_t {
    kProbs,    // what the gating function gives
    kLogits,   // llama4
    kSigmoid,  // grovemoe: sigmoid of the logits, whatever the gating
};

// What an expert axis means in a tensor.
enum class Role : uint32_t {
    kSlab,         // weights: one contiguous slab per expert
    kPerExpert,    // what belongs to the slabs: a bias row, a scale or an input scale per expert
    kRouter,       // one row per expert of the router's weights
    kRouterValue,  // one number per expert of the router: its bias, the selection bias
    kChunkSlab,    // a slab shared by `experts_per_chunk` neighbouring experts (grovemoe)
    kExpertIds,    // no expert axis: the values are expert ids (hash-routed layers)
};

const char* name(Gating gating);
const char* name(Selection selection);
const char* name(Role role);

// A tensor that changes when experts are left out. All others are trunk, shared experts among them.
struct ExpertTensor {
    size_t tensor = 0;  // index into the tensors the layout was made from
    uint32_t layer = 0;
    Role role = Role::kSlab;
    int axis = -1;             // which of ne[] counts experts (always the outermost used one); -1 for kExpertIds
    uint64_t count = 0;        // length of that axis
    uint64_t slice_bytes = 0;  // of one index on that axis; slices are contiguous and in order
};

struct MoeLayout {
    std::string arch;
    uint32_t n_layer = 0;                 // block_count: with next-token-prediction blocks
    uint32_t n_layer_nextn = 0;           // of them, at the end
    uint32_t n_expert = 0;                // 0: a dense model; what follows is then empty or 0
    std::vector<uint32_t> expert_counts;  // per layer, of a shard whose layers hold different numbers; else empty
    std::vector<uint32_t> n_expert_used;  // per layer; 0 where nothing is routed
    uint32_t n_expert_groups = 0;         // 0 or 1: selection is not grouped
    uint32_t n_expert_groups_used = 0;
    uint32_t experts_per_chunk = 0;  // 0: no chunk experts

    Gating gating = Gating::kNone;
    Selection selection = Selection::kProbs;
    bool renormalized = false;  // the weights of the chosen experts are divided by their sum

    std::vector<uint32_t> moe_layers;   // with a router or experts
    std::vector<uint32_t> hash_layers;  // of them, those whose experts are looked up by token
    std::vector<ExpertTensor> tensors;  // in file order

    uint64_t trunk_bytes = 0;                // all that is not experts, routers included
    uint64_t expert_bytes = 0;               // kSlab, kPerExpert and kChunkSlab
    std::vector<uint64_t> per_expert_bytes;  // per layer: of one expert, its chunk not counted

    // Experts of a layer that routes.
    uint32_t experts_in(uint32_t layer) const { return expert_counts.empty() ? n_expert : expert_counts.at(layer); }
};

// Why all layers of a shard of this model hold equally many experts, whoever reads it; empty where they need not.
std::string why_equal(const MoeLayout& layout);

// What decides which keeps fit, from the file alone.
Routing routing_of(const MoeLayout& layout);

// `name` stands for the file in messages.
MoeLayout moe_layout(const gguf::Directory& metadata, const std::vector<gguf::Tensor>& tensors,
                     const std::string& name);
MoeLayout moe_layout(const gguf::GGUFMap& model);

}  // namespace moeshard
