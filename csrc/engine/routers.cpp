#include "engine/routers.hpp"

#include <string>
#include <utility>

#include "ggml-backend.h"
#include "llama-model.h"
#include "moeshard/error.hpp"

namespace moeshard::hook {

Routers::Routers(const llama_model& model, std::vector<WholeRouter> routers)
    : context_(ggml_init({(routers.size() + 1) * ggml_tensor_overhead(), nullptr, true})) {
    if (!context_) throw Error("there is no memory for the whole routers");
    for (WholeRouter& router : routers) {
        const auto index = static_cast<size_t>(router.layer);
        const ggml_tensor* own = index < model.layers.size() ? model.layers[index].ffn_gate_inp : nullptr;
        const auto n_expert = static_cast<int64_t>(router.keep.size());
        const std::string name = "the whole router of layer " + std::to_string(router.layer);
        if (!own) throw Error(name + " is of a layer that routes nothing; the file is damaged, write it again");
        ggml_tensor* weight = ggml_new_tensor_2d(context_.get(), own->type, own->ne[0], n_expert);
        const bool fits = ggml_nbytes(weight) == router.weight.size() &&
                          (router.bias.empty() || router.bias.size() == router.keep.size()) &&
                          (router.selection_bias.empty() || router.selection_bias.size() == router.keep.size());
        if (!fits) throw Error(name + " has another size than the model's; the file is damaged, write it again");
        ggml_backend_buffer_type_t type = ggml_backend_buffer_is_host(own->buffer)
                                              ? ggml_backend_cpu_buffer_type()
                                              : ggml_backend_buffer_get_type(own->buffer);
        buffers_.emplace_back(ggml_backend_buft_alloc_buffer(type, ggml_backend_buft_get_alloc_size(type, weight)));
        ggml_backend_buffer_t buffer = buffers_.back().get();
        if (!buffer ||
            ggml_backend_tensor_alloc(buffer, weight, ggml_backend_buffer_get_base(buffer)) != GGML_STATUS_SUCCESS) {
            throw Error("there is no memory for " + name);
        }
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_tensor_set(weight, router.weight.data(), 0, router.weight.size());
        layers_[router.layer] = {weight, std::move(router.bias), std::move(router.selection_bias),
                                 std::move(router.keep)};
    }
}

const Routers::Layer* Routers::find(int32_t layer) const {
    const auto found = layers_.find(layer);
    return found == layers_.end() ? nullptr : &found->second;
}

}  // namespace moeshard::hook
