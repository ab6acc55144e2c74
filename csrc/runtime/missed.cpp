#include "runtime/missed.hpp"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>

#include "engine/control.hpp"
#include "gguf/checked.hpp"
#include "llama.h"
#include "moe/expert_counts.hpp"
#include "moe/tensor_name.hpp"
#include "moeshard/error.hpp"
#include "moeshard/gguf.hpp"
#include "moeshard/shard.hpp"

namespace moeshard {

namespace {

std::vector<float> as_floats(const gguf::Entry& entry) {
    std::vector<float> values(entry.value.size / sizeof(float));
    std::memcpy(values.data(), entry.value.data, values.size() * sizeof(float));
    return values;
}

// The whole routers that a shard file was written with; none for other files and for models that are no files.
std::vector<hook::WholeRouter> read_routers(const std::string& path) {
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(path, ignored)) return {};
    const gguf::GGUFMap file(path);
    const auto facts = shard_facts(file);
    if (!facts || !facts->has_router) return {};
    std::map<int32_t, hook::WholeRouter> layers;
    for (const gguf::Entry& entry : file.metadata().entries) {
        if (!starts_with(entry.key, kRouterKey)) continue;
        BlockName name;
        const bool right = name.parse(std::string_view(entry.key).substr(kRouterKey.size())) && entry.is_array &&
                           entry.type == gguf::ValueType::kUint8 && name.layer < facts->n_layer;
        if (!right) {
            throw Error(path + ": " + gguf::printable(entry.key) +
                        " is no router; the file is damaged, write it again");
        }
        hook::WholeRouter& router = layers[static_cast<int32_t>(name.layer)];
        if (name.stem != "ffn_gate_inp") {
            router.selection_bias = as_floats(entry);
        } else if (name.suffix == "bias") {
            router.bias = as_floats(entry);
        } else {
            router.weight.assign(entry.value.data, entry.value.data + entry.value.size);
        }
    }
    std::vector<hook::WholeRouter> routers;
    for (auto& [layer, router] : layers) {
        router.layer = layer;
        const uint8_t* row = facts->keep.data() + static_cast<size_t>(layer) * facts->n_expert;
        router.keep.assign(row, row + facts->n_expert);
        routers.push_back(std::move(router));
    }
    return routers;
}

}  // namespace

void Missed::clear() {
    mean.clear();
    by_layer.clear();
}

void Missed::add(const std::vector<float>& layers) {
    float sum = 0.0f;
    int n = 0;
    for (const float share : layers) {
        if (std::isnan(share)) continue;
        sum += share;
        ++n;
    }
    mean.push_back(n == 0 ? 0.0f : sum / static_cast<float>(n));
    by_layer.insert(by_layer.end(), layers.begin(), layers.end());
}

void meter(llama_context* ctx, const Model& model, std::vector<Missed>* missed) {
    if (!missed) return hook::set_meter(ctx, nullptr);
    char kind[16];
    const bool is_shard = llama_model_meta_val_str(model.handle(), "moeshard.kind", kind, sizeof(kind)) >= 0;
    if (is_shard && !hook::has_routers(ctx)) {
        hook::set_routers(ctx, read_routers(model.path()));
    }
    hook::set_meter(ctx, [missed](int32_t seq, int32_t, const std::vector<float>& layers) {
        (*missed)[static_cast<size_t>(seq)].add(layers);
    });
}

}  // namespace moeshard
