#include "moe/classify.hpp"

#include <algorithm>
#include <string_view>

#include "ggml.h"
#include "gguf/checked.hpp"
#include "moe/tensor_name.hpp"

namespace moeshard {

namespace {

using gguf::Tensor;

bool contains(std::string_view text, std::string_view word) { return text.find(word) != text.npos; }

// Words that llama.cpp uses for nothing but routed experts and their routers ("shexp" has none of them).
bool speaks_of_experts(std::string_view name) {
    if (contains(name, "shexp")) return false;
    for (const std::string_view word : {"exps", "expert", "exp_probs", "gate_inp", "tid2eid"}) {
        if (contains(name, word)) return true;
    }
    return false;
}

// Parts of a block that have nothing to do with experts, whatever their sizes: a head of 128 channels in a model of 128
// experts is a coincidence.
bool is_known_trunk(std::string_view stem) {
    for (const std::string_view part : {"ffn_gate", "ffn_up", "ffn_down", "proj", "inp_gate"}) {
        if (stem == part) return true;
    }
    for (const std::string_view part :
         {"attn_",     "cross_attn_",  "post_",       "pre_ffw_",    "layer_output_", "ffn_norm",
          "ffn_sub_",  "ffn_res_",     "ffn_latent_", "ffn_routed_", "ffn_conv_",     "ffn.act",
          "ssm_",      "shortconv.",   "indexer",     "nextn.",      "hc_",           "ple_",
          "time_mix_", "channel_mix_", "altup_",      "laurel_",     "vis_"}) {
        if (starts_with(stem, part)) return true;
    }
    return contains(stem, "shexp");
}

bool holds_integers(const Tensor& tensor) { return tensor.type >= GGML_TYPE_I8 && tensor.type <= GGML_TYPE_I64; }

// "ffn_gate.3": one tensor per expert.
bool is_single_expert(std::string_view stem) {
    const size_t dot = stem.rfind('.');
    return starts_with(stem, "ffn_") && dot != stem.npos && dot + 1 < stem.size() &&
           stem.find_first_not_of("0123456789", dot + 1) == stem.npos;
}

}  // namespace

void Classifier::fail(const Tensor& tensor, const std::string& why) const {
    throw Error(name_ + ": tensor '" + gguf::printable(tensor.name) + "' " + tensor.shape() + " (" +
                tensor.type_name() + ") " + why);
}

std::optional<ExpertTensor> Classifier::operator()(const Tensor& tensor) const {
    BlockName name;
    const bool in_block = name.parse(tensor.name);
    if (in_block && is_single_expert(name.stem)) {
        fail(tensor, "holds a single expert, a form that llama.cpp no longer loads; convert the model again");
    }
    if (speaks_of_experts(tensor.name)) {
        if (!in_block) fail(tensor, "speaks of experts but belongs to no block ('blk.N.')");
        if (starts_with(name.stem, "ffn_norm")) return std::nullopt;  // of what all experts of a layer read
        if (layout_.n_expert == 0) {
            fail(tensor, "speaks of experts, but " + layout_.arch + ".expert_count is 0 or missing");
        }
        if (name.layer >= layout_.n_layer) {
            fail(tensor, "lies beyond the " + std::to_string(layout_.n_layer) + " blocks of the model (block_count)");
        }
        return named_expert(tensor, name);
    }
    if (!in_block || layout_.n_expert == 0 || is_shard_ || is_known_trunk(name.stem)) return std::nullopt;
    // A part of a block that is not known: trunk if it has no room for experts.
    const bool has_room =
        std::any_of(tensor.ne.begin(), tensor.ne.end(), [&](uint64_t n) { return n > 0 && n % layout_.n_expert == 0; });
    if (has_room || holds_integers(tensor)) {
        fail(tensor, "may depend on the " + std::to_string(layout_.n_expert) +
                         " experts: neither its name nor its shape decides; update moeshard");
    }
    return std::nullopt;
}

std::optional<ExpertTensor> Classifier::named_expert(const Tensor& tensor, const BlockName& name) const {
    if (const std::optional<ExpertAxis> own = expert_axis(name)) {
        return on_axis(tensor, name, own->role, own->axis, layout_.experts_in(name.layer));
    }
    if (ends_with(name.stem, "_chexps")) return chunk(tensor, name);
    if (ends_with(name.stem, "_exps")) {
        fail(tensor, "belongs to experts, but what it is is not known; update moeshard");
    }
    if (name.stem == "ffn_gate_inp") return router(tensor, name);
    if (name.stem == "ffn_gate_tid2eid") return ids(tensor, name);
    fail(tensor, "speaks of experts, but what it is is not known; update moeshard");
}

ExpertTensor Classifier::on_axis(const Tensor& tensor, const BlockName& name, Role role, int axis,
                                 uint64_t count) const {
    const auto at = static_cast<size_t>(axis);
    bool fits = tensor.ne[at] == count;
    for (size_t i = at + 1; i < tensor.ne.size(); ++i) fits = fits && tensor.ne[i] == 1;
    if (!fits) {
        fail(tensor, "should have " + std::to_string(count) + " experts in its dimension " + std::to_string(axis) +
                         " and none after it");
    }
    if (axis == 0 && ggml_blck_size(static_cast<ggml_type>(tensor.type)) != 1) {
        fail(tensor, "is quantised in blocks of several experts, which cannot be taken apart");
    }
    return {0, name.layer, role, axis, count, tensor.nbytes / count};
}

ExpertTensor Classifier::chunk(const Tensor& tensor, const BlockName& name) const {
    const uint64_t size = layout_.experts_per_chunk;
    if (size == 0 || layout_.n_expert % size != 0) {
        fail(tensor, "holds chunk experts, but " + layout_.arch + ".experts_per_group is " + std::to_string(size) +
                         ", which does not divide the " + std::to_string(layout_.n_expert) + " experts");
    }
    if (name.suffix != "weight") fail(tensor, "belongs to chunk experts, but what it is is not known; update moeshard");
    return on_axis(tensor, name, Role::kChunkSlab, 2, layout_.n_expert / size);
}

std::optional<ExpertTensor> Classifier::router(const Tensor& tensor, const BlockName& name) const {
    // gemma4 scales what the router reads; other scales of a router belong to its whole matrix.
    const bool of_input = tensor.ne[0] == n_embd_ || tensor.ne[0] == 1;
    if (name.suffix == "scale" && of_input && tensor.nbytes == tensor.row_bytes) return std::nullopt;
    fail(tensor, "belongs to a router, but what it is is not known; update moeshard");
}

ExpertTensor Classifier::ids(const Tensor& tensor, const BlockName& name) const {
    if (!holds_integers(tensor) || tensor.nbytes == 0 || tensor.ne[0] != layout_.n_expert_used[name.layer]) {
        fail(tensor, "should hold the ids of " + std::to_string(layout_.n_expert_used[name.layer]) +
                         " experts per token as integers");
    }
    return {0, name.layer, Role::kExpertIds, -1, 0, 0};
}

}  // namespace moeshard
