// Which experts a node holds: one boolean per layer and expert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moeshard {

// What of a model decides whether a keep is usable.
struct Routing {
    int32_t n_layer = 0;   // rows of a keep, next-token-prediction blocks included
    int32_t n_expert = 0;  // columns of a keep; 0 for a dense model
    // Experts of each layer of a shard whose layers hold different numbers, the most being n_expert; empty for others.
    std::vector<int32_t> expert_counts;
    // Experts chosen per token in each layer; 0 where the layer routes nothing.
    std::vector<int32_t> n_expert_used;
    // Grouped selection (DeepSeek-V3): the best n_group_used of n_group groups are searched for experts.
    int32_t n_group = 1;
    int32_t n_group_used = 1;
    // A token's weight of an expert multiplies the expert's input, not its output (Llama 4): see LayerTrace.
    bool weighs_inputs = false;

    // Experts of a layer that routes. What a keep says of others, up to n_expert, carries no meaning.
    int32_t experts_in(int32_t layer) const {
        return expert_counts.empty() ? n_expert : expert_counts.at(static_cast<size_t>(layer));
    }
    bool routes(int32_t layer) const { return n_expert_used.at(static_cast<size_t>(layer)) > 0; }
    // The layers that route, ascending.
    std::vector<int32_t> moe_layers() const;
};

// A boolean array (n_layer, n_expert), row-major: true where the expert may be chosen. Rows of layers without a router
// carry no meaning.
class Keep {
public:
    // Copies `keep` (n_layer * n_expert bytes, zero drops). Throws Error where a side is not positive.
    Keep(int32_t n_layer, int32_t n_expert, const uint8_t* keep);

    int32_t n_layer() const { return n_layer_; }
    int32_t n_expert() const { return n_expert_; }
    const uint8_t* row(int32_t layer) const { return keep_.data() + static_cast<size_t>(layer) * n_expert_; }
    bool operator()(int32_t layer, int32_t expert) const { return row(layer)[expert] != 0; }
    bool operator==(const Keep& other) const {
        return n_layer_ == other.n_layer_ && n_expert_ == other.n_expert_ && keep_ == other.keep_;
    }

    // Throws Error, naming the layer, where the model could not route every token to kept experts only: the shape
    // differs, fewer experts are kept than a token uses, or a choice of expert groups would hold too few of them.
    void check(const Routing& routing) const;

private:
    int32_t n_layer_;
    int32_t n_expert_;
    std::vector<uint8_t> keep_;
};

// The ids that a hash-routed layer uses instead of the `n_used` ids of its table row, under one row of a keep: every
// dropped id is replaced, in list order, by the next kept id (upward, cyclically) that the token does not use yet.
void replace_dropped(const int32_t* row, int32_t n_used, const uint8_t* keep, int32_t n_expert, int32_t* out);

}  // namespace moeshard
