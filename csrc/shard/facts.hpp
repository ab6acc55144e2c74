// The keys under "moeshard." in the metadata of a shard.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "moe/expert_counts.hpp"
#include "moe/tensor_name.hpp"
#include "moeshard/shard.hpp"
#include "shard/assemble.hpp"

namespace moeshard::shard {

inline constexpr std::string_view kPrefix = "moeshard.";
inline constexpr std::string_view kKind = "moeshard.kind";
inline constexpr std::string_view kLayers = kLayersKey;
inline constexpr std::string_view kCounts = kCountsKey;               // only where layers hold different numbers
inline constexpr std::string_view kKept = "moeshard.kept";            // ids of each layer, layer by layer
inline constexpr std::string_view kTensors = "moeshard.tensors";      // of a trunk: all of the model, in order
inline constexpr std::string_view kSource = "moeshard.source.";       // the model's own value of a replaced key
inline constexpr std::string_view kRouter = kRouterKey;               // a router's tensor, as the model has it
inline constexpr std::string_view kExpertCount = "moeshard.experts";  // of the whole model

// Keys that are about the file and not about the model.
inline bool is_of_file(std::string_view key) { return starts_with(key, kPrefix) || starts_with(key, "split."); }

// The facts as entries, notes last.
std::vector<std::vector<Piece>> fact_entries(const ShardFacts& facts);

}  // namespace moeshard::shard
