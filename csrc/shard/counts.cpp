#include "shard/counts.hpp"

#include <algorithm>

namespace moeshard::shard {

namespace {

uint32_t count(const uint8_t* begin, uint32_t n) {
    return static_cast<uint32_t>(std::count_if(begin, begin + n, [](uint8_t kept) { return kept != 0; }));
}

// llama.cpp knows one number for all layers; other loaders than ours refuse a file with several.
void count_kept(const MoeLayout& layout, const std::vector<uint32_t>& layers, const Keep& keep, bool per_layer,
                Counts& counts, const std::string& name) {
    counts.per_layer.assign(layout.n_layer, 0);
    const uint32_t first = count(keep.row(static_cast<int32_t>(layers.front())), layout.n_expert);
    for (const uint32_t layer : layers) {
        const uint32_t kept = count(keep.row(static_cast<int32_t>(layer)), layout.n_expert);
        if (kept == 0) throw Error(name + ": the keep holds no experts in layer " + std::to_string(layer));
        counts.per_layer[layer] = kept;
        counts.n_expert = std::max(counts.n_expert, kept);
        if (kept == first) continue;
        const std::string different = name + ": layer " + std::to_string(layers.front()) + " keeps " +
                                      std::to_string(first) + " experts and layer " + std::to_string(layer) +
                                      " keeps " + std::to_string(kept) + "; ";
        const std::string why = why_equal(layout);
        const std::string remedy =
            "keep equally many in each (--balance and moeshard.balanced_keep make the nearest such keep)";
        if (!why.empty()) throw Error(different + why + ", so " + remedy);
        if (!per_layer) {
            throw Error(different + "a GGUF has one expert_count for all layers, so " + remedy +
                        ", or write a shard that moeshard alone loads (--per-layer)");
        }
    }
}

// Groups of which nothing is kept are no groups of the shard. Those that are left must keep equally many, and be as
// many in each layer.
void count_groups(const MoeLayout& layout, const std::vector<uint32_t>& layers, const Keep& keep, Counts& counts,
                  const std::string& name) {
    const uint32_t size = layout.n_expert / layout.n_expert_groups;
    for (const uint32_t layer : layers) {
        const uint8_t* row = keep.row(static_cast<int32_t>(layer));
        std::vector<uint32_t> kept;
        std::string list;
        for (uint32_t group = 0; group < layout.n_expert_groups; ++group) {
            const uint32_t n = count(row + static_cast<size_t>(group) * size, size);
            if (n > 0) kept.push_back(n);
            list += (group == 0 ? "" : ", ") + std::to_string(n);
        }
        const auto n_group = static_cast<uint32_t>(kept.size());
        const bool equal = std::all_of(kept.begin(), kept.end(), [&](uint32_t n) { return n == kept.front(); });
        if (!equal || (counts.n_group != 0 && n_group != counts.n_group)) {
            throw Error(name + ": layer " + std::to_string(layer) + " keeps " + list + " experts of its " +
                        std::to_string(layout.n_expert_groups) +
                        " groups; the model chooses among groups of equal size, so a shard keeps equally many of each "
                        "(or none of some, of the same number of groups in every layer); --balance and "
                        "moeshard.balanced_keep make the nearest such keep");
        }
        counts.n_group = n_group;
    }
    counts.n_group_used = layout.n_expert_groups_used;
    // Where all groups that are left are searched there is nothing to choose, which llama.cpp writes as one group.
    if (counts.n_group <= counts.n_group_used) counts.n_group = counts.n_group_used = 1;
}

// llama.cpp weights a chunk by the probability of the expert whose number is the chunk's. In a shard the numbers are
// others, and only a keep of the first chunks gives each chunk the expert that it has in the model. And it takes as
// many chunks per token as experts: with fewer it aborts.
void check_chunks(const MoeLayout& layout, const std::vector<uint32_t>& layers, const Keep& keep, const Counts& counts,
                  const std::string& name) {
    const uint32_t size = layout.experts_per_chunk;
    if (size <= 1) return;
    const uint32_t n_keep = counts.n_expert;
    for (const uint32_t layer : layers) {
        const uint32_t least = counts.n_expert_used[layer] * size;
        const bool are_first = n_keep % size == 0 && count(keep.row(static_cast<int32_t>(layer)), n_keep) == n_keep;
        if (are_first && n_keep >= least) continue;
        const uint32_t whole = std::max(n_keep / size * size, least);
        throw Error(
            name + ": " + layout.arch + " weights its chunks of " + std::to_string(size) +
            " experts by the number of an expert, which changes in a shard, and uses as many chunks per token as "
            "experts; only the first experts, in enough whole chunks (such as 0-" +
            std::to_string(whole - 1) + "), make a shard that computes what the masked model does. Layer " +
            std::to_string(layer) + " keeps others; run the whole model under a mask instead");
    }
}

void count_used(const MoeLayout& layout, const ShardParams& params, Counts& counts, const std::string& name) {
    counts.n_expert_used = layout.n_expert_used;
    // Most architectures read one number for all layers.
    uint32_t fewest = counts.n_expert;
    for (uint32_t layer = 0; layer < layout.n_layer; ++layer) {
        if (layout.n_expert_used[layer] != 0) fewest = std::min(fewest, counts.per_layer[layer]);
    }
    for (uint32_t layer = 0; layer < layout.n_layer; ++layer) {
        uint32_t& used = counts.n_expert_used[layer];
        if (used == 0) continue;
        const uint32_t own = used;
        if (params.n_expert_used != 0) used = params.n_expert_used;
        if (params.clamp) used = std::min(used, fewest);
        if (used > counts.per_layer[layer]) {
            throw Error(name + ": the keep holds " + std::to_string(counts.per_layer[layer]) + " experts of layer " +
                        std::to_string(layer) + ", but a token uses " + std::to_string(used) +
                        "; keep more, or clamp what the shard uses (--clamp)");
        }
        const auto& hashed = layout.hash_layers;
        if (used > own && std::find(hashed.begin(), hashed.end(), layer) != hashed.end()) {
            throw Error(name + ": layer " + std::to_string(layer) + " looks " + std::to_string(own) +
                        " experts per token up in a table, so a shard cannot use " + std::to_string(used));
        }
    }
}

}  // namespace

std::vector<uint32_t> expert_layers(const MoeLayout& layout) {
    std::vector<uint32_t> layers;
    for (const ExpertTensor& tensor : layout.tensors) layers.push_back(tensor.layer);
    std::sort(layers.begin(), layers.end());
    layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
    return layers;
}

Counts count_experts(const MoeLayout& layout, const Keep& keep, const ShardParams& params, const std::string& name) {
    const std::vector<uint32_t> layers = expert_layers(layout);
    Routing routing = routing_of(layout);
    if (keep.n_layer() != routing.n_layer || keep.n_expert() != routing.n_expert) keep.check(routing);  // says so
    Counts counts;
    count_kept(layout, layers, keep, params.per_layer, counts, name);
    count_used(layout, params, counts, name);
    routing.n_expert_used.assign(counts.n_expert_used.begin(), counts.n_expert_used.end());
    try {
        keep.check(routing);
    } catch (const Error& error) {
        throw Error(name + ": " + error.what());
    }
    if (layout.n_expert_groups > 1) count_groups(layout, layers, keep, counts, name);
    check_chunks(layout, layers, keep, counts, name);
    return counts;
}

}  // namespace moeshard::shard
