// Shards whose layers hold different numbers of experts: only this loader reads them, by keys of their own.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moeshard {

inline constexpr std::string_view kLayersKey = "moeshard.layers";
// What a router's tensor is written down under, before the tensor's name.
inline constexpr std::string_view kRouterKey = "moeshard.router.";
inline constexpr std::string_view kCountsKey = "moeshard.expert_counts";  // of each of these layers

// The values of the two keys as counts per layer, (n_layer,); `n_expert`, which is the largest of them, in layers that
// are not listed. Throws Error, beginning with `name`, on lists that no shard has.
std::vector<uint32_t> expert_counts(const std::vector<uint64_t>& layers, const std::vector<uint64_t>& counts,
                                    uint32_t n_layer, uint32_t n_expert, const std::string& name);

}  // namespace moeshard
