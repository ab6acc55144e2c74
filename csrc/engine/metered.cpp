// The meter's part of a graph: routers are read as they are before any mask, and what tokens miss is counted outside
// of it. The logits only have to outlive the graph; nothing else is computed, but for a shard's whole routers.
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "engine/graph_input.hpp"
#include "ggml-backend.h"
#include "llama-hparams.h"
#include "llama-model.h"
#include "moeshard/error.hpp"

namespace moeshard::hook {

namespace {

Gate::Function function_of(int gating) {
    switch (gating) {
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID:
            return Gate::Function::kSigmoid;
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS:
            return Gate::Function::kSqrtSoftplus;
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX:
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT:  // over the chosen ones, which is the same up to a factor
            return Gate::Function::kSoftmax;
        default:
            throw Error("the gating function " + std::to_string(gating) + " cannot be metered");
    }
}

const ggml_tensor* router_of(const llama_model& model, int il) {
    return model.layers[static_cast<size_t>(il)].ffn_gate_inp;
}

// Of a shard all tokens are, of a whole model those under a mask.
bool is_measured(const MaskRows* mask, bool masked) { return mask != nullptr || !masked; }

}  // namespace

void GraphInput::meter(const llm_graph_context& graph, ggml_tensor* logits, int gating, ggml_tensor* bias, int il) {
    // GroveMoE routes its chunk experts from the same scores in a second call.
    if (!metered_ || (!metered_layers_.empty() && metered_layers_.back().il == il)) return;
    Metered layer;
    layer.il = il;
    if (!masked_) {
        layer.whole = state_.routers->find(il);
        // What the router reads is known from the scores, where they are of a router at all.
        const ggml_tensor* own = logits->op == GGML_OP_ADD ? logits->src[0] : logits;
        if (!layer.whole || own->op != GGML_OP_MUL_MAT || own->src[0] != router_of(state_.model, il)) return;
        logits = ggml_mul_mat(graph.ctx0, layer.whole->weight, own->src[1]);
        bias = nullptr;
    }
    layer.logits = logits;
    layer.bias = bias;
    layer.gate.function = function_of(gating);
    layer.gate.n_used = state_.routing.n_expert_used.at(static_cast<size_t>(il));
    layer.gate.n_group = state_.routing.n_group;
    layer.gate.n_group_used = state_.routing.n_group_used;
    ggml_set_output(logits);
    if (logits->view_src) ggml_set_output(logits->view_src);
    ggml_build_forward_expand(graph.gf, logits);
    metered_layers_.push_back(std::move(layer));
}

void GraphInput::read_metered(const llama_ubatch& ubatch, ggml_backend_sched_t sched) const {
    if (!metered_ || !state_.missed || metered_layers_.empty()) return;
    std::vector<const MaskRows*> masks;
    bool any = false;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        masks.push_back(state_.mask(ubatch.seq_id[i][0]));
        any = any || is_measured(masks.back(), masked_);
    }
    if (!any) return;
    // Copies from devices are asked for at once and waited for once.
    std::vector<std::vector<float>> copies(metered_layers_.size());
    for (size_t k = 0; k < metered_layers_.size(); ++k) {
        ggml_tensor* logits = metered_layers_[k].logits;
        if (ggml_backend_buffer_is_host(logits->buffer)) continue;
        copies[k].resize(static_cast<size_t>(ggml_nelements(logits)));
        ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(sched, logits), logits, copies[k].data(), 0,
                                      ggml_nbytes(logits));
    }
    ggml_backend_sched_synchronize(sched);
    const auto n_slots = static_cast<size_t>(state_.n_slots);
    std::vector<float> missed(ubatch.n_tokens * n_slots, std::numeric_limits<float>::quiet_NaN());
    GateScratch scratch;
    std::vector<float> biased;
    for (size_t k = 0; k < metered_layers_.size(); ++k) {
        const Metered& layer = metered_layers_[k];
        const auto n_expert = static_cast<int32_t>(layer.logits->ne[0]);
        Gate gate = layer.gate;
        if (layer.bias) gate.bias = state_.bias(layer.il, layer.bias);
        if (layer.whole) gate.bias = layer.whole->selection_bias;
        const auto* rows = copies[k].empty() ? static_cast<const float*>(layer.logits->data) : copies[k].data();
        const auto table = state_.hash_tables.find(layer.il);
        const auto slot = static_cast<size_t>(state_.slot_of_layer[static_cast<size_t>(layer.il)]);
        for (const int32_t token : tokens_of(ubatch, layer.logits->ne[1])) {
            const MaskRows* mask = masks[static_cast<size_t>(token)];
            if (is_measured(mask, masked_)) {
                const uint8_t* keep = layer.whole ? layer.whole->keep.data() : mask->keep.row(layer.il);
                const int32_t* ids = table == state_.hash_tables.end()
                                         ? nullptr
                                         : table->second.data() + static_cast<size_t>(ubatch.token[token]) *
                                                                      static_cast<size_t>(gate.n_used);
                const float* logits = rows;
                if (layer.whole && !layer.whole->bias.empty()) {
                    biased = layer.whole->bias;
                    for (size_t i = 0; i < biased.size(); ++i) biased[i] += rows[i];
                    logits = biased.data();
                }
                missed[static_cast<size_t>(token) * n_slots + slot] =
                    missed_share(logits, n_expert, gate, keep, ids, scratch);
            }
            rows += n_expert;
        }
    }
    std::vector<float> own(n_slots);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (!is_measured(masks[i], masked_)) continue;
        own.assign(missed.begin() + static_cast<std::ptrdiff_t>(i * n_slots),
                   missed.begin() + static_cast<std::ptrdiff_t>((i + 1) * n_slots));
        state_.missed(ubatch.seq_id[i][0], ubatch.pos[i], own);
    }
}

}  // namespace moeshard::hook
