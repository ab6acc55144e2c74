// The counts of experts in the metadata of a shard.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moeshard/keep.hpp"
#include "moeshard/shard.hpp"

namespace moeshard::shard {

struct Counts {
    uint32_t n_expert = 0;                // kept in every layer; the most in any, where they keep different numbers
    std::vector<uint32_t> per_layer;      // kept, of each layer
    std::vector<uint32_t> n_expert_used;  // per layer; 0 where nothing is routed
    uint32_t n_group = 0;                 // 0: as the model has it
    uint32_t n_group_used = 0;
};

// Layers of which the model's file holds experts.
std::vector<uint32_t> expert_layers(const MoeLayout& layout);

// Throws Error where no shard holds `keep` and computes what the masked model does; `name` stands for the model.
Counts count_experts(const MoeLayout& layout, const Keep& keep, const ShardParams& params, const std::string& name);

}  // namespace moeshard::shard
