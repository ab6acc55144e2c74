#include "engine/hook_state.hpp"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <set>
#include <unordered_map>

#include "engine/moeshard-hook.h"
#include "llama-context.h"
#include "llama-model.h"
#include "moeshard/error.hpp"

namespace moeshard::hook {

namespace {

std::mutex registry_mutex;
std::unordered_map<const llama_context*, std::unique_ptr<State>>& registry() {
    // Never destroyed: contexts may be freed while the process exits.
    static auto* states = new std::unordered_map<const llama_context*, std::unique_ptr<State>>;
    return *states;
}

thread_local State* current = nullptr;

}  // namespace

State* current_state() { return current; }

UbatchScope::UbatchScope(const llama_context* ctx) : outer_(current) {
    const std::lock_guard lock(registry_mutex);
    const auto found = registry().find(ctx);
    current = found == registry().end() ? nullptr : found->second.get();
    if (current) current->building = nullptr;
}

UbatchScope::~UbatchScope() { current = outer_; }

void context_freed(const llama_context* ctx) {
    const std::lock_guard lock(registry_mutex);
    registry().erase(ctx);
}

State& attach(llama_context* ctx) {
    const std::lock_guard lock(registry_mutex);
    auto& state = registry()[ctx];
    if (!state) {
        const llama_model& model = ctx->get_model();
        state = std::make_unique<State>(model, routing_of(model));
    }
    return *state;
}

Routing routing_of(const llama_model& model) {
    const llama_hparams& hparams = model.hparams;
    Routing routing;
    routing.n_layer = static_cast<int32_t>(hparams.n_layer_all);
    routing.n_expert = static_cast<int32_t>(hparams.n_expert);
    // As llm_graph_context::build_moe_ffn decides it.
    routing.weighs_inputs = model.arch == LLM_ARCH_LLAMA4;
    bool equal = true;
    for (int32_t layer = 0; layer < routing.n_layer; ++layer) {
        const ggml_tensor* router = model.layers[static_cast<size_t>(layer)].ffn_gate_inp;
        const bool routes = routing.n_expert > 0 && router != nullptr;
        routing.n_expert_used.push_back(routes ? static_cast<int32_t>(hparams.n_expert_used(layer)) : 0);
        routing.expert_counts.push_back(routes ? static_cast<int32_t>(router->ne[1]) : routing.n_expert);
        equal = equal && routing.expert_counts.back() == routing.n_expert;
    }
    if (equal) routing.expert_counts.clear();
    if (hparams.n_expert_groups > 1) {
        routing.n_group = static_cast<int32_t>(hparams.n_expert_groups);
        routing.n_group_used = static_cast<int32_t>(hparams.n_group_used);
    }
    return routing;
}

MaskRows::MaskRows(const Keep& keep, const Routing& routing) : keep(keep) {
    for (const int32_t layer : routing.moe_layers()) {
        for (int32_t expert = 0; expert < routing.experts_in(layer); ++expert) {
            rows.push_back(keep(layer, expert) ? 0.0f : -INFINITY);
        }
    }
}

State::State(const llama_model& of, Routing facts) : model(of), routing(std::move(facts)) {
    for (int32_t layer = 0; layer < routing.n_layer; ++layer) {
        slot_of_layer.push_back(routing.routes(layer) ? n_slots++ : -1);
        if (routing.routes(layer)) {
            slot_begin.push_back(slot_begin.back() + static_cast<size_t>(routing.experts_in(layer)));
        }
    }
    offloaded = !model.devices.empty();
    final_norm = model.output_norm;
}

const MaskRows* State::mask(int32_t seq) const {
    const auto found = mask_of_seq.find(seq);
    return found != mask_of_seq.end() ? found->second.get() : mask_of_all.get();
}

std::shared_ptr<const MaskRows> State::find(const Keep& keep) const {
    if (mask_of_all && mask_of_all->keep == keep) return mask_of_all;
    for (const auto& [seq, mask] : mask_of_seq) {
        if (mask->keep == keep) return mask;
    }
    return nullptr;
}

const std::vector<float>& State::bias(int32_t layer, const ggml_tensor* tensor) {
    std::vector<float>& values = biases[layer];
    if (values.empty()) {
        values.resize(static_cast<size_t>(ggml_nelements(tensor)));
        ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
    }
    return values;
}

size_t State::n_masks() const {
    std::set<const MaskRows*> different;
    if (mask_of_all) different.insert(mask_of_all.get());
    for (const auto& [seq, mask] : mask_of_seq) different.insert(mask.get());
    return different.size();
}

}  // namespace moeshard::hook
