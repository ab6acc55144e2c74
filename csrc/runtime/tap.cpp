#include "runtime/tap.hpp"

#include <algorithm>
#include <string_view>
#include <tuple>

#include "ggml-backend.h"
#include "ggml.h"
#include "moeshard/error.hpp"

namespace moeshard {

void Tap::begin(const std::vector<int32_t>& layers) {
    end();
    layers_ = layers;
    for (const int32_t layer : layers) {
        const std::string block = "blk." + std::to_string(layer) + ".";
        by_weight_[block + "ffn_gate_inp.weight"] = {layer, What::kInput};
        by_weight_[block + "ffn_down_exps.weight"] = {layer, What::kHidden};
        by_result_["l_out-" + std::to_string(layer)] = {layer, What::kResidual};
    }
}

void Tap::end() {
    layers_.clear();
    by_result_.clear();
    by_weight_.clear();
    found_.clear();
    failed_.clear();
}

const Tap::Wanted* Tap::wanted(const ggml_tensor& tensor) const {
    const bool product = tensor.op == GGML_OP_MUL_MAT || tensor.op == GGML_OP_MUL_MAT_ID;
    const auto& names = product && tensor.src[0] != nullptr ? by_weight_ : by_result_;
    const auto at = names.find(product ? tensor.src[0]->name : tensor.name);
    return at == names.end() ? nullptr : &at->second;
}

bool Tap::callback(ggml_tensor* tensor, bool ask, void* self) {
    auto& tap = *static_cast<Tap*>(self);
    if (tap.layers_.empty()) return !ask;
    const Wanted* wanted = tap.wanted(*tensor);
    if (ask) return wanted != nullptr;
    return wanted == nullptr || tap.read(*tensor, *wanted);
}

// False once nothing more is wanted of this graph.
bool Tap::read(const ggml_tensor& tensor, const Wanted& wanted) {
    // An input of a product is still there when the product is done: it is none that is computed in place.
    const ggml_tensor* source = wanted.what == What::kResidual ? &tensor : tensor.src[1];
    if (source->type != GGML_TYPE_F32 || !ggml_is_contiguous(source)) {
        failed_ = std::string(source->name) + " is computed in another layout than this moeshard reads";
        return false;
    }
    std::vector<float> values(static_cast<size_t>(ggml_nelements(source)));
    ggml_backend_tensor_get(source, values.data(), 0, values.size() * sizeof(float));
    LayerTrace& layer = found_[wanted.layer];
    (wanted.what == What::kInput    ? layer.inputs
     : wanted.what == What::kHidden ? layer.hidden
                                    : layer.residual) = std::move(values);
    // A product that is scaled before anything else has no name of its own.
    if (wanted.what == What::kHidden) layer.scaled = std::string_view(tensor.name).substr(0, 12) != "ffn_moe_down";
    return !(wanted.what == What::kResidual && wanted.layer == layers_.back());
}

void Tap::hand_over(UbatchTrace& ubatch) {
    if (!failed_.empty()) throw Error(failed_);
    std::vector<LayerTrace> kept;
    for (LayerTrace& layer : ubatch.layers) {
        if (!std::binary_search(layers_.begin(), layers_.end(), layer.layer)) continue;
        LayerTrace& found = found_[layer.layer];
        const size_t n = ubatch.n_tokens();
        const size_t rows = n * static_cast<size_t>(layer.n_used);
        for (const auto& [values, unit, what] : {std::tuple(&found.residual, n, "residual stream"),
                                                 std::tuple(&found.hidden, rows, "experts' activations"),
                                                 std::tuple(&found.inputs, n, "router's input")}) {
            if (values->empty() || values->size() % unit != 0) {
                throw Error("layer " + std::to_string(layer.layer) + ": the " + what +
                            " cannot be read on this architecture");
            }
        }
        layer.inputs = std::move(found.inputs);
        layer.hidden = std::move(found.hidden);
        layer.scaled = found.scaled;
        layer.residual = std::move(found.residual);
        kept.push_back(std::move(layer));
    }
    if (kept.size() != layers_.size()) throw Error("not all of the layers that are to be read route tokens");
    ubatch.layers = std::move(kept);
    found_.clear();
}

}  // namespace moeshard
