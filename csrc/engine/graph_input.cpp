#include "engine/graph_input.hpp"

#include <cstring>
#include <string>

#include "ggml-backend.h"
#include "moeshard/error.hpp"

namespace moeshard::hook {

GraphInput::GraphInput(State& state, const llm_graph_context& graph)
    : state_(state),
      n_tokens_(graph.n_tokens),
      n_outputs_(graph.n_outputs),
      tracing_(state.tracing),
      options_(state.trace) {
    // ggml keeps an earlier graph's memory plan for a new one that has as many nodes and leafs, although other tensors
    // must outlive it now. Leafs that count what is traced make such graphs differ.
    const int n_leafs = tracing_ ? 16 * (1 + (options_.probs ? 1 : 0) + (options_.norms ? 2 : 0)) : 0;
    for (int i = 0; i < n_leafs; ++i) {
        ggml_tensor* leaf = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_F32, 1);
        ggml_set_input(leaf);  // the scheduler places inputs, and only those, where no node uses them
        ggml_build_forward_expand(graph.gf, leaf);
    }
}

bool GraphInput::built_for(const State& now) const {
    return tracing_ == now.tracing &&
           (!tracing_ || (options_.probs == now.trace.probs && options_.norms == now.trace.norms));
}

ggml_tensor* GraphInput::mask(const llm_graph_context& graph, int64_t n_rows, int il) {
    if (n_rows != n_tokens_ && n_rows != n_outputs_) {
        throw Error("layer " + std::to_string(il) + " routes " + std::to_string(n_rows) +
                    " rows, which are neither the tokens nor the outputs of the micro-batch");
    }
    Mask& mask = n_rows == n_tokens_ ? of_tokens_ : of_outputs_;
    if (!mask.input) {
        mask.input =
            ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, static_cast<int64_t>(state_.slot_begin.back()), n_rows);
        ggml_set_input(mask.input);
        ggml_set_name(mask.input, "moeshard_mask");
        // Without this copy a device would receive every layer's view as an input of its own, and the scheduler takes
        // only so many per split.
        mask.on_device = state_.offloaded ? ggml_cont(graph.ctx0, mask.input) : mask.input;
    }
    const int32_t slot = state_.slot_of_layer[static_cast<size_t>(il)];
    mask.slots.push_back(slot);
    const size_t begin = state_.slot_begin[static_cast<size_t>(slot)];
    const size_t n_expert = state_.slot_begin[static_cast<size_t>(slot) + 1] - begin;
    return ggml_view_2d(graph.ctx0, mask.on_device, static_cast<int64_t>(n_expert), n_rows, n_expert * sizeof(float),
                        begin * static_cast<size_t>(n_rows) * sizeof(float));
}

ggml_tensor* GraphInput::hash_ids(const llm_graph_context& graph, ggml_tensor* selected, int il) {
    // selected = get_rows(tid2eid, tokens)
    const ggml_tensor* table = selected->src[0];
    auto& rows = state_.hash_tables[il];
    if (rows.empty()) {
        rows.resize(static_cast<size_t>(ggml_nelements(table)));
        ggml_backend_tensor_get(table, rows.data(), 0, ggml_nbytes(table));
    }
    ggml_tensor* input = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I32, selected->ne[0], selected->ne[1]);
    ggml_set_input(input);
    ggml_set_name(input, "moeshard_hash_ids");
    hashed_.push_back({input, il});
    return input;
}

void GraphInput::set_input(const llama_ubatch* ubatch) {
    set_mask(of_tokens_, *ubatch);
    set_mask(of_outputs_, *ubatch);
    for (const HashIds& ids : hashed_) set_hash_ids(ids, *ubatch);
}

// The tokens behind the rows of an input.
std::vector<int32_t> GraphInput::rows(const llama_ubatch& ubatch, int64_t n_rows) const {
    std::vector<int32_t> tokens;
    tokens.reserve(static_cast<size_t>(n_rows));
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (n_rows == ubatch.n_tokens || ubatch.output[i]) tokens.push_back(static_cast<int32_t>(i));
    }
    return tokens;
}

void GraphInput::set_mask(const Mask& mask, const llama_ubatch& ubatch) const {
    if (!mask.input) return;
    const auto n_rows = static_cast<size_t>(mask.input->ne[1]);
    // A token that belongs to several sequences is computed once, under the mask of the first.
    std::vector<const MaskRows*> masks;
    masks.reserve(n_rows);
    for (const int32_t token : rows(ubatch, mask.input->ne[1])) masks.push_back(state_.mask(ubatch.seq_id[token][0]));
    auto* data = static_cast<float*>(mask.input->data);
    for (const int32_t slot : mask.slots) {
        const size_t begin = state_.slot_begin[static_cast<size_t>(slot)];
        const size_t n_expert = state_.slot_begin[static_cast<size_t>(slot) + 1] - begin;
        float* layer = data + begin * n_rows;
        for (size_t row = 0; row < n_rows; ++row) {
            if (masks[row]) {
                std::memcpy(layer + row * n_expert, masks[row]->rows.data() + begin, n_expert * sizeof(float));
            } else {
                std::memset(layer + row * n_expert, 0, n_expert * sizeof(float));
            }
        }
    }
}

void GraphInput::set_hash_ids(const HashIds& ids, const llama_ubatch& ubatch) const {
    const auto n_used = static_cast<int32_t>(ids.input->ne[0]);
    const std::vector<int32_t>& table = state_.hash_tables.at(ids.il);
    auto* out = static_cast<int32_t*>(ids.input->data);
    for (const int32_t token : rows(ubatch, ids.input->ne[1])) {
        const int32_t* row = table.data() + static_cast<size_t>(ubatch.token[token]) * n_used;
        const MaskRows* mask = state_.mask(ubatch.seq_id[token][0]);
        if (mask) {
            replace_dropped(row, n_used, mask->keep.row(ids.il), state_.routing.n_expert, out);
        } else {
            std::memcpy(out, row, static_cast<size_t>(n_used) * sizeof(int32_t));
        }
        out += n_used;
    }
}

}  // namespace moeshard::hook
