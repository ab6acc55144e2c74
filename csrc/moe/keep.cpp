#include "moeshard/keep.hpp"

#include <algorithm>
#include <string>

#include "moeshard/error.hpp"

namespace moeshard {

namespace {

std::string shape(int32_t rows, int32_t columns) {
    return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

// Fewest kept experts that a choice of n_group_used groups can hold, or -1 where fewer groups than that can win. A
// group is scored by its two best experts, so one with fewer than two kept never wins against one that has them.
int32_t fewest_reachable(const uint8_t* row, const Routing& routing) {
    const int32_t size = routing.n_expert / routing.n_group;
    std::vector<int32_t> kept;
    for (int32_t group = 0; group < routing.n_group; ++group) {
        const uint8_t* begin = row + static_cast<size_t>(group) * size;
        const auto count = static_cast<int32_t>(std::count_if(begin, begin + size, [](uint8_t k) { return k != 0; }));
        if (count >= std::min<int32_t>(2, size)) kept.push_back(count);
    }
    if (static_cast<int32_t>(kept.size()) < routing.n_group_used) return -1;
    std::partial_sort(kept.begin(), kept.begin() + routing.n_group_used, kept.end());
    int32_t sum = 0;
    for (int32_t i = 0; i < routing.n_group_used; ++i) sum += kept[static_cast<size_t>(i)];
    return sum;
}

}  // namespace

std::vector<int32_t> Routing::moe_layers() const {
    std::vector<int32_t> layers;
    for (int32_t layer = 0; layer < n_layer; ++layer) {
        if (routes(layer)) layers.push_back(layer);
    }
    return layers;
}

Keep::Keep(int32_t n_layer, int32_t n_expert, const uint8_t* keep) : n_layer_(n_layer), n_expert_(n_expert) {
    if (n_layer <= 0 || n_expert <= 0) {
        throw Error("keep must have at least one layer and one expert, got shape " + shape(n_layer, n_expert));
    }
    keep_.assign(keep, keep + static_cast<size_t>(n_layer) * static_cast<size_t>(n_expert));
}

void Keep::check(const Routing& routing) const {
    if (routing.n_expert == 0) throw Error("this model is dense: it has no experts that a keep could select");
    if (n_layer_ != routing.n_layer || n_expert_ != routing.n_expert) {
        throw Error("keep has shape " + shape(n_layer_, n_expert_) +
                    ", but the model needs (n_layer, n_expert) = " + shape(routing.n_layer, routing.n_expert));
    }
    for (int32_t layer = 0; layer < n_layer_; ++layer) {
        const int32_t used = routing.n_expert_used[static_cast<size_t>(layer)];
        if (used == 0) continue;
        const uint8_t* begin = row(layer);
        const auto kept = static_cast<int32_t>(
            std::count_if(begin, begin + routing.experts_in(layer), [](uint8_t k) { return k != 0; }));
        if (kept < used) {
            throw Error("layer " + std::to_string(layer) + " keeps " + std::to_string(kept) +
                        " experts, but the model routes each token to " + std::to_string(used) +
                        "; keep at least that many in every layer");
        }
        if (routing.n_group <= 1) continue;
        const int32_t reachable = fewest_reachable(begin, routing);
        if (reachable < used) {
            const std::string groups = std::to_string(routing.n_group_used) + " of " + std::to_string(routing.n_group);
            throw Error("layer " + std::to_string(layer) +
                        " keeps too few experts in some groups: the model searches " + groups + " expert groups for " +
                        std::to_string(used) + " experts per token, and " +
                        (reachable < 0 ? "fewer than that many groups keep two experts"
                                       : "a choice of groups holds only " + std::to_string(reachable)) +
                        "; keep more experts per group");
        }
    }
}

void replace_dropped(const int32_t* row, int32_t n_used, const uint8_t* keep, int32_t n_expert, int32_t* out) {
    std::copy(row, row + n_used, out);
    for (int32_t i = 0; i < n_used; ++i) {
        int32_t id = row[i];
        if (keep[id]) continue;
        // Ends: check() has seen to it that at least n_used experts are kept.
        do {
            id = (id + 1) % n_expert;
        } while (!keep[id] || std::find(out, out + n_used, id) != out + n_used);
        out[i] = id;
    }
}

}  // namespace moeshard
