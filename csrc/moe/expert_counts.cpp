#include "moe/expert_counts.hpp"

#include "moeshard/error.hpp"

namespace moeshard {

std::vector<uint32_t> expert_counts(const std::vector<uint64_t>& layers, const std::vector<uint64_t>& counts,
                                    uint32_t n_layer, uint32_t n_expert, const std::string& name) {
    const auto fail = [&](std::string_view key, const std::string& what) {
        throw Error(name + ": " + std::string(key) + " " + what + "; the file is damaged, write it again");
    };
    if (counts.size() != layers.size()) {
        fail(kCountsKey, "has " + std::to_string(counts.size()) + " values for the " + std::to_string(layers.size()) +
                             " layers of " + std::string(kLayersKey));
    }
    std::vector<uint32_t> per_layer(n_layer, n_expert);
    for (size_t i = 0; i < layers.size(); ++i) {
        if (layers[i] >= n_layer || (i > 0 && layers[i] <= layers[i - 1])) {
            fail(kLayersKey, "does not hold ascending numbers in range");
        }
        if (counts[i] == 0 || counts[i] > n_expert) {
            fail(kCountsKey, "is " + std::to_string(counts[i]) + " in layer " + std::to_string(layers[i]) +
                                 ", it must be from 1 to the expert_count, " + std::to_string(n_expert));
        }
        per_layer[layers[i]] = static_cast<uint32_t>(counts[i]);
    }
    return per_layer;
}

}  // namespace moeshard
