// Shards whose layers hold different numbers of experts, as llama.cpp's loader sees them.
#include <string_view>

#include "engine/moeshard-hook.h"
#include "gguf.h"
#include "llama-hparams.h"
#include "moe/expert_counts.hpp"
#include "moe/tensor_name.hpp"
#include "moeshard/error.hpp"

namespace moeshard::hook {

namespace {

// How shards write these lists.
std::vector<uint64_t> read_uints(const gguf_context* metadata, std::string_view key) {
    const int64_t at = gguf_find_key(metadata, std::string(key).c_str());
    if (at < 0 || gguf_get_kv_type(metadata, at) != GGUF_TYPE_ARRAY ||
        gguf_get_arr_type(metadata, at) != GGUF_TYPE_UINT32) {
        throw Error(std::string(key) + " is no list of uint32; the file is damaged, write it again");
    }
    const auto* values = static_cast<const uint32_t*>(gguf_get_arr_data(metadata, at));
    return {values, values + gguf_get_arr_n(metadata, at)};
}

}  // namespace

std::vector<int64_t> own_shape(const gguf_context* metadata, const llama_hparams& hparams, const std::string& tensor,
                               const std::vector<int64_t>& ne) {
    if (gguf_find_key(metadata, std::string(kCountsKey).c_str()) < 0) return ne;
    if (hparams.n_expert_groups > 1 || hparams.n_group_experts > 1) {
        throw Error("expert groups and chunk experts go with equally many experts in every layer; the file is damaged");
    }
    BlockName name;
    if (!name.parse(tensor)) return ne;
    const auto experts = expert_axis(name);
    const auto axis = static_cast<size_t>(experts ? experts->axis : 0);
    if (!experts || axis >= ne.size() || name.layer >= hparams.n_layer_all) return ne;
    const uint32_t count = expert_counts(read_uints(metadata, kLayersKey), read_uints(metadata, kCountsKey),
                                         hparams.n_layer_all, hparams.n_expert, tensor)[name.layer];
    if (hparams.n_expert_used(name.layer) > count) {
        throw Error(tensor + ": a token uses " + std::to_string(hparams.n_expert_used(name.layer)) +
                    " experts of a layer that holds " + std::to_string(count) + "; the file is damaged");
    }
    std::vector<int64_t> own = ne;
    own[axis] = count;
    return own;
}

}  // namespace moeshard::hook
