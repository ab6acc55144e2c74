#include <algorithm>
#include <cmath>
#include <memory>
#include <string>

#include "engine/graph_input.hpp"
#include "engine/moeshard-hook.h"
#include "ggml-backend.h"
#include "moeshard/error.hpp"

namespace moeshard::hook {

State* current_state();

namespace {

GraphInput* input_of(const llm_graph_result* res) {
    for (const auto& input : res->inputs) {
        if (auto* ours = dynamic_cast<GraphInput*>(input.get())) return ours;
    }
    return nullptr;
}

GraphInput* building(const llm_graph_context& graph) {
    State* state = current_state();
    if (!state || state->n_slots == 0) return nullptr;
    if (!state->building) {
        auto input = std::make_unique<GraphInput>(*state, graph);
        state->building = input.get();
        graph.res->add_input(std::move(input));
    }
    return state->building;
}

GraphInput* building_trace(const llm_graph_context& graph) {
    GraphInput* input = building(graph);
    return input && current_state()->tracing ? input : nullptr;
}

// Keeps a tensor's memory from being reused before it is read. A view's memory is its source's.
void keep_for_trace(const llm_graph_context& graph, ggml_tensor* tensor) {
    ggml_set_output(tensor);
    if (tensor->view_src) ggml_set_output(tensor->view_src);
    ggml_build_forward_expand(graph.gf, tensor);
}

// Reads a tensor [n, n_tokens] whose rows may lie apart.
template <typename T>
std::vector<T> read_rows(const ggml_tensor* tensor, size_t n, size_t n_tokens) {
    std::vector<T> out(n * n_tokens);
    const size_t row = n * sizeof(T);
    const size_t stride = tensor->ne[0] == 1 && n > 1 ? tensor->nb[2] : tensor->nb[1];
    ggml_backend_tensor_get_2d(tensor, out.data(), 0, row, n_tokens, stride, row);
    return out;
}

// Rows of `own` numbers as rows of `n_expert`.
std::vector<float> widened(std::vector<float> rows, size_t own, size_t n_tokens, int32_t n_expert, float value) {
    const auto wide = static_cast<size_t>(n_expert);
    if (own == wide) return rows;
    std::vector<float> out(n_tokens * wide, value);
    for (size_t token = 0; token < n_tokens; ++token) {
        std::copy_n(rows.data() + token * own, own, out.data() + token * wide);
    }
    return out;
}

void clear_dropped(LayerTrace& layer, const State& state, const UbatchTrace& trace, float value) {
    for (size_t token = 0; token < trace.n_tokens(); ++token) {
        const MaskRows* mask = state.mask(trace.seq[token]);
        if (!mask) continue;
        float* row = layer.probs.data() + token * static_cast<size_t>(layer.n_expert);
        for (int32_t expert = 0; expert < layer.n_expert; ++expert) {
            if (!mask->keep(layer.layer, expert)) row[expert] = value;
        }
    }
}

LayerTrace read_layer(const GraphInput::Traced& traced, const State& state, const UbatchTrace& trace) {
    LayerTrace layer;
    layer.layer = traced.il;
    layer.n_used = static_cast<int32_t>(traced.ids->ne[0]);
    layer.n_expert = state.routing.n_expert;
    layer.weighs_inputs = state.routing.weighs_inputs;
    const size_t n_tokens = trace.n_tokens();
    const auto n_used = static_cast<size_t>(layer.n_used);
    if (traced.ids->ne[1] != static_cast<int64_t>(n_tokens)) {
        throw Error("the routing of layer " + std::to_string(traced.il) + " was computed for " +
                    std::to_string(traced.ids->ne[1]) + " of " + std::to_string(n_tokens) +
                    " tokens: this architecture drops tokens early and cannot be traced");
    }
    layer.ids = read_rows<int32_t>(traced.ids, n_used, n_tokens);
    layer.weights = read_rows<float>(traced.weights, n_used, n_tokens);
    if (traced.probs) {
        const auto own = static_cast<size_t>(state.routing.experts_in(traced.il));
        // Where the gating is a softmax over the chosen experts only, the scores are its logits.
        const bool logits = traced.probs->op == GGML_OP_MUL_MAT || traced.probs->op == GGML_OP_ADD;
        const float dropped = logits ? -INFINITY : 0.0f;
        layer.probs = widened(read_rows<float>(traced.probs, own, n_tokens), own, n_tokens, layer.n_expert, dropped);
        clear_dropped(layer, state, trace, dropped);
    }
    if (traced.squares) {
        layer.norms = read_rows<float>(traced.squares, n_used, n_tokens);
        for (float& norm : layer.norms) norm = std::sqrt(norm);
    }
    return layer;
}

}  // namespace

bool UbatchScope::can_reuse(const llm_graph_result* res) const {
    const State* state = current_state();
    if (!state || state->n_slots == 0) return true;
    const GraphInput* input = input_of(res);
    return input && input->built_for(*state);
}

void UbatchScope::computed(const llm_graph_result* res, const llama_ubatch& ubatch, ggml_backend_sched_t sched) const {
    State* state = current_state();
    const GraphInput* input = state ? input_of(res) : nullptr;
    if (!input) return;
    input->read_metered(ubatch, sched);
    if (!state->tracing || !state->sink) return;
    ggml_backend_sched_synchronize(sched);
    UbatchTrace trace;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        trace.seq.push_back(ubatch.seq_id[i][0]);
        trace.pos.push_back(ubatch.pos[i]);
    }
    for (const auto& traced : input->traced) trace.layers.push_back(read_layer(traced, *state, trace));
    state->sink(trace);
}

ggml_tensor* expert_mask(const llm_graph_context& graph, ggml_tensor* scores, int gating, ggml_tensor* bias, int il) {
    GraphInput* input = building(graph);
    if (!input) return nullptr;
    input->meter(graph, scores, gating, bias, il);
    return input->mask(graph, scores->ne[1], il);
}

ggml_tensor* hash_experts(const llm_graph_context& graph, ggml_tensor* selected, int il) {
    GraphInput* input = building(graph);
    return input && selected && input->masked() ? input->hash_ids(graph, selected, il) : selected;
}

void trace_router(const llm_graph_context& graph, ggml_tensor* probs, ggml_tensor* ids, ggml_tensor* weights, int il) {
    GraphInput* input = building_trace(graph);
    // GroveMoE routes its chunk experts from the same scores in a second call, which is not traced.
    if (!input || (!input->traced.empty() && input->traced.back().il == il)) return;
    GraphInput::Traced traced;
    traced.il = il;
    traced.ids = ids;
    traced.weights = weights;
    keep_for_trace(graph, ids);
    keep_for_trace(graph, weights);
    if (current_state()->trace.probs) {
        traced.probs = probs->view_src ? probs->view_src : probs;  // probs is reshaped to [1, n_expert, n_tokens]
        keep_for_trace(graph, traced.probs);
    }
    input->traced.push_back(traced);
}

void trace_experts(const llm_graph_context& graph, ggml_tensor* experts, int il) {
    GraphInput* input = building_trace(graph);
    if (!input || !current_state()->trace.norms || input->traced.empty()) return;
    GraphInput::Traced& traced = input->traced.back();
    if (traced.il != il || traced.squares) return;
    // A dot product of each output with itself: it reads them once and is vectorised, unlike a sum of squares.
    ggml_tensor* rows =
        ggml_reshape_3d(graph.ctx0, experts, experts->ne[0], 1, ggml_nelements(experts) / experts->ne[0]);
    traced.squares = ggml_reshape_3d(graph.ctx0, ggml_mul_mat(graph.ctx0, rows, rows), 1, experts->ne[1],
                                     experts->ne[2]);  // [1, n_used, n_tokens]
    keep_for_trace(graph, traced.squares);
}

bool defer_output_rows(const llm_graph_context& graph, ggml_tensor* out_ids) {
    GraphInput* input = building_trace(graph);
    if (!input) return false;
    input->deferred_rows = out_ids;
    ggml_build_forward_expand(graph.gf, out_ids);  // allocated even where no final norm picks the rows
    return true;
}

ggml_tensor* drop_deferred_rows(const llm_graph_context& graph, ggml_tensor* cur, const ggml_tensor* norm) {
    State* state = current_state();
    GraphInput* input = state ? state->building : nullptr;
    // Known by its weight: some architectures build norms of single layers without saying which layer.
    const bool final_norm = input && input->deferred_rows && norm && norm == state->final_norm;
    if (!final_norm || !ggml_is_matrix(cur) || cur->ne[1] != graph.n_tokens) return cur;
    ggml_tensor* rows = input->deferred_rows;
    input->deferred_rows = nullptr;
    return ggml_get_rows(graph.ctx0, cur, rows);
}

}  // namespace moeshard::hook
