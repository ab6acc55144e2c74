#include "moeshard/moe_layout.hpp"

#include <algorithm>
#include <optional>

#include "gguf/checked.hpp"
#include "moe/classify.hpp"
#include "moe/expert_counts.hpp"
#include "moe/gating.hpp"

namespace moeshard {

namespace {

using gguf::Directory;
using gguf::Entry;
using gguf::Tensor;

// Beyond these the pinned llama.cpp aborts (LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS).
constexpr uint64_t kMaxLayers = 512;
constexpr uint64_t kMaxExperts = 1024;

// Reads keys of the model's architecture; errors name the file.
class Metadata {
public:
    template <typename Read>
    auto get(const Entry& entry, Read read) const {
        try {
            return read(entry);
        } catch (const Error& error) {
            fail(error.what());
        }
    }

    Metadata(const Directory& directory, const std::string& name) : directory_(directory), name_(name) {
        const Entry* arch = directory.find("general.architecture");
        if (arch == nullptr) fail("has no general.architecture: not a model");
        arch_ = get(*arch, [](const Entry& entry) { return std::string(entry.as_string()); });
        // Messages are full of it.
        if (arch_ != gguf::printable(arch_))
            fail("general.architecture is '" + gguf::printable(arch_) + "', which is no name");
    }

    const std::string& arch() const { return arch_; }
    const std::string& name() const { return name_; }
    std::string key(const char* suffix) const { return arch_ + "." + suffix; }
    [[noreturn]] void fail(const std::string& what) const { throw Error(name_ + ": " + what); }

    const Entry* find(const char* suffix) const { return directory_.find(key(suffix)); }

    uint64_t uint(const char* suffix, uint64_t fallback) const {
        const Entry* entry = find(suffix);
        return entry == nullptr ? fallback : get(*entry, [](const Entry& e) { return e.as_uint(); });
    }

    uint32_t uint_up_to(const char* suffix, uint64_t limit) const {
        const uint64_t value = uint(suffix, 0);
        if (value > limit) {
            fail(key(suffix) + " is " + std::to_string(value) + ", at most " + std::to_string(limit) + " is possible");
        }
        return static_cast<uint32_t>(value);
    }

    bool boolean(const char* suffix) const {
        const Entry* entry = find(suffix);
        return entry != nullptr && get(*entry, [](const Entry& e) { return e.as_bool(); });
    }

    uint64_t n_vocab() const {
        const Entry* tokens = directory_.find("tokenizer.ggml.tokens");
        return uint("vocab_size", tokens == nullptr ? 0 : tokens->count);
    }

private:
    const Directory& directory_;
    const std::string& name_;
    std::string arch_;
};

void read_counts(const Metadata& metadata, MoeLayout& layout) {
    layout.arch = metadata.arch();
    layout.n_layer = metadata.uint_up_to("block_count", kMaxLayers);
    if (layout.n_layer == 0) metadata.fail("has no " + metadata.key("block_count") + ": not a language model");
    layout.n_layer_nextn = metadata.uint_up_to("nextn_predict_layers", layout.n_layer);
    layout.n_expert = metadata.uint_up_to("expert_count", kMaxExperts);
    layout.n_expert_groups = metadata.uint_up_to("expert_group_count", kMaxExperts);
    layout.n_expert_groups_used = metadata.uint_up_to("expert_group_used_count", kMaxExperts);
    layout.experts_per_chunk = metadata.uint_up_to("experts_per_group", kMaxExperts);
    layout.per_expert_bytes.assign(layout.n_layer, 0);
}

// Only shards that this loader alone reads have counts of their own for each layer.
void read_own_counts(const Metadata& metadata, const Directory& directory, MoeLayout& layout) {
    const Entry* counts = directory.find(kCountsKey);
    if (counts == nullptr) return;
    const Entry* layers = directory.find(kLayersKey);
    if (layers == nullptr) {
        metadata.fail("has " + std::string(kCountsKey) + " but no " + std::string(kLayersKey) +
                      "; the file is damaged, write it again");
    }
    const auto uints = [&](const Entry& entry) {
        return metadata.get(entry, [](const Entry& e) { return e.as_uints(); });
    };
    layout.expert_counts =
        expert_counts(uints(*layers), uints(*counts), layout.n_layer, layout.n_expert, metadata.name());
}

// Hybrid models give one number per layer, all others one for the model.
void read_used(const Metadata& metadata, MoeLayout& layout) {
    layout.n_expert_used.assign(layout.n_layer, 0);
    const Entry* entry = metadata.find("expert_used_count");
    if (layout.n_expert == 0 || entry == nullptr) return;
    if (entry->is_array && entry->count != layout.n_layer) {
        metadata.fail(entry->key + " has " + std::to_string(entry->count) + " values for " +
                      std::to_string(layout.n_layer) + " layers");
    }
    const auto values = metadata.get(*entry, [](const Entry& e) { return e.as_uints(); });
    for (uint32_t layer = 0; layer < layout.n_layer; ++layer) {
        const uint64_t used = values[entry->is_array ? layer : 0];
        if (used > layout.experts_in(layer)) {
            metadata.fail(entry->key + " is " + std::to_string(used) + " in layer " + std::to_string(layer) +
                          ", more than the " + std::to_string(layout.experts_in(layer)) + " experts of the " +
                          (layout.expert_counts.empty() ? "model" : "layer"));
        }
        layout.n_expert_used[layer] = static_cast<uint32_t>(used);
    }
}

// What llama.cpp asserts.
void check_routing(const Metadata& metadata, const MoeLayout& layout) {
    const bool any_used =
        std::any_of(layout.n_expert_used.begin(), layout.n_expert_used.end(), [](uint32_t used) { return used > 0; });
    if (!any_used) metadata.fail(metadata.key("expert_used_count") + " is missing or 0 in a model with experts");
    const uint32_t groups = layout.n_expert_groups;
    if (groups <= 1) return;
    if (groups >= layout.n_expert || layout.n_expert % groups != 0) {
        metadata.fail(metadata.key("expert_group_count") + " is " + std::to_string(groups) +
                      ", which does not divide the " + std::to_string(layout.n_expert) + " experts into groups");
    }
    if (layout.n_expert_groups_used == 0 || layout.n_expert_groups_used >= groups) {
        metadata.fail(metadata.key("expert_group_used_count") + " is " + std::to_string(layout.n_expert_groups_used) +
                      ", it must be at least 1 and less than the " + std::to_string(groups) + " groups");
    }
}

// deepseek2 files from before the key are told apart as the pinned llama.cpp does it: one known model is sigmoid.
Gating fallback_gating(const Metadata& metadata, const MoeLayout& layout, const GatingRule& rule) {
    const uint32_t n_main = layout.n_layer - layout.n_layer_nextn;
    const bool is_deepseek2 = rule.arch == "deepseek2" || rule.arch == "mistral4";
    if (is_deepseek2 && (n_main == 47 || n_main == 48) && metadata.n_vocab() == 154880) return Gating::kSigmoid;
    return rule.gating;
}

void read_gating(const Metadata& metadata, MoeLayout& layout) {
    const auto* rule = std::find_if(std::begin(kGatingRules), std::end(kGatingRules),
                                    [&](const GatingRule& candidate) { return candidate.arch == layout.arch; });
    if (rule == std::end(kGatingRules)) return;
    layout.selection = rule->selection;
    layout.renormalized = rule->renormalise == Renormalise::kMetadata ? metadata.boolean("expert_weights_norm")
                                                                      : rule->renormalise == Renormalise::kYes;
    layout.gating = rule->gating;
    if (!rule->from_metadata) return;

    constexpr char kKey[] = "expert_gating_func";
    const uint64_t value = metadata.uint(kKey, 0);
    if (value > static_cast<uint64_t>(Gating::kSqrtSoftplus)) {
        metadata.fail(metadata.key(kKey) + " is " + std::to_string(value) +
                      ", which the llama.cpp of this build does not know; update moeshard");
    }
    layout.gating = value == 0 ? fallback_gating(metadata, layout, *rule) : static_cast<Gating>(value);
    if (layout.gating == Gating::kNone) {
        metadata.fail("has no " + metadata.key(kKey) + ", without which " + layout.arch +
                      " cannot run; convert the model again");
    }
}

void count_bytes(const std::vector<Tensor>& tensors, MoeLayout& layout) {
    for (const Tensor& tensor : tensors) layout.trunk_bytes += tensor.nbytes;
    for (const ExpertTensor& expert : layout.tensors) {
        const bool per_expert = expert.role == Role::kSlab || expert.role == Role::kPerExpert;
        if (!per_expert && expert.role != Role::kChunkSlab) continue;
        const uint64_t nbytes = tensors[expert.tensor].nbytes;
        layout.trunk_bytes -= nbytes;
        layout.expert_bytes += nbytes;
        if (per_expert) layout.per_expert_bytes[expert.layer] += expert.slice_bytes;
    }
}

void list_layers(MoeLayout& layout) {
    std::vector<bool> routed(layout.n_layer);
    std::vector<bool> hashed(layout.n_layer);
    for (const ExpertTensor& expert : layout.tensors) {
        routed[expert.layer] = true;
        if (expert.role == Role::kExpertIds) hashed[expert.layer] = true;
    }
    for (uint32_t layer = 0; layer < layout.n_layer; ++layer) {
        if (routed[layer]) layout.moe_layers.push_back(layer);
        if (hashed[layer]) layout.hash_layers.push_back(layer);
        if (!routed[layer]) layout.n_expert_used[layer] = 0;
    }
}

}  // namespace

const char* name(Gating gating) {
    constexpr const char* kNames[] = {"none", "softmax", "sigmoid", "softmax_weight", "sqrt_softplus"};
    return kNames[static_cast<uint32_t>(gating)];
}

const char* name(Selection selection) {
    constexpr const char* kNames[] = {"probs", "logits", "sigmoid"};
    return kNames[static_cast<uint32_t>(selection)];
}

const char* name(Role role) {
    constexpr const char* kNames[] = {"slab", "per_expert", "router", "router_value", "chunk_slab", "expert_ids"};
    return kNames[static_cast<uint32_t>(role)];
}

std::string why_equal(const MoeLayout& layout) {
    if (layout.n_expert_groups > 1) return "the model chooses among groups of experts, which are equally large";
    if (!layout.hash_layers.empty()) return "the model looks experts up by token id in some layers";
    const bool chunks = std::any_of(layout.tensors.begin(), layout.tensors.end(),
                                    [](const ExpertTensor& tensor) { return tensor.role == Role::kChunkSlab; });
    if (chunks) return "the model has chunk experts, which neighbouring experts share";
    return "";
}

Routing routing_of(const MoeLayout& layout) {
    Routing routing;
    routing.n_layer = static_cast<int32_t>(layout.n_layer);
    routing.n_expert = static_cast<int32_t>(layout.n_expert);
    routing.n_expert_used.assign(layout.n_expert_used.begin(), layout.n_expert_used.end());
    routing.expert_counts.assign(layout.expert_counts.begin(), layout.expert_counts.end());
    if (layout.n_expert_groups > 1) {
        routing.n_group = static_cast<int32_t>(layout.n_expert_groups);
        routing.n_group_used = static_cast<int32_t>(layout.n_expert_groups_used);
    }
    return routing;
}

MoeLayout moe_layout(const Directory& directory, const std::vector<Tensor>& tensors, const std::string& file) {
    const Metadata metadata(directory, file);
    MoeLayout layout;
    read_counts(metadata, layout);
    read_own_counts(metadata, directory, layout);
    read_used(metadata, layout);
    const bool is_shard = directory.find("moeshard.kind") != nullptr;
    const Classifier classifier(layout, metadata.uint("embedding_length", 0), is_shard, file);
    for (size_t i = 0; i < tensors.size(); ++i) {
        if (std::optional<ExpertTensor> expert = classifier(tensors[i])) {
            expert->tensor = i;
            layout.tensors.push_back(*expert);
        }
    }
    list_layers(layout);
    if (!layout.expert_counts.empty()) {
        const std::string why = why_equal(layout);
        if (!why.empty()) metadata.fail(std::string(kCountsKey) + " cannot be: " + why);
    }
    // Some dense models say that they have one expert.
    if (layout.n_expert == 1 && layout.tensors.empty()) layout.n_expert = 0;
    if (!layout.moe_layers.empty()) {
        check_routing(metadata, layout);
        read_gating(metadata, layout);
    }
    count_bytes(tensors, layout);
    return layout;
}

MoeLayout moe_layout(const gguf::GGUFMap& model) { return moe_layout(model.metadata(), model.tensors(), model.path()); }

}  // namespace moeshard
