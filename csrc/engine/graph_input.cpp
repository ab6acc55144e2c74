#include "engine/graph_input.hpp"

#include <cstring>
#include <string>

#include "ggml-backend.h"
#include "moeshard/error.hpp"

namespace moeshard::hook {

namespace {

// Up to so many rows are written out for every micro-batch, which saves the graph a node per layer; more of them would
// be more bytes than the activations.
constexpr int64_t kDirectRows = 32;

// Graphs have room for more masks than are in use, so that another one does not rebuild them.
int64_t room_for(size_t n_masks) {
    int64_t room = 4;
    while (room < static_cast<int64_t>(n_masks)) room *= 2;
    return room;
}

}  // namespace

GraphInput::GraphInput(State& state, const llm_graph_context& graph)
    : state_(state),
      n_tokens_(graph.n_tokens),
      n_outputs_(graph.n_outputs),
      tracing_(state.tracing),
      options_(state.trace),
      masked_(state.masked),
      metered_(state.measures()),
      capacity_(room_for(state.n_masks())) {
    // ggml keeps an earlier graph's memory plan for a new one that has as many nodes and leafs, although other tensors
    // must outlive it now. Leafs that count what is traced make such graphs differ.
    const int n_leafs =
        (tracing_ ? 16 * (1 + (options_.probs ? 1 : 0) + (options_.norms ? 2 : 0)) : 0) + (metered_ ? 8 : 0);
    for (int i = 0; i < n_leafs; ++i) {
        ggml_tensor* leaf = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_F32, 1);
        ggml_set_input(leaf);  // the scheduler places inputs, and only those, where no node uses them
        ggml_build_forward_expand(graph.gf, leaf);
    }
}

bool GraphInput::built_for(const State& now) const {
    return masked_ == now.masked && metered_ == now.measures() && static_cast<int64_t>(now.n_masks()) <= capacity_ &&
           tracing_ == now.tracing &&
           (!tracing_ || (options_.probs == now.trace.probs && options_.norms == now.trace.norms));
}

// A view [n_expert, n_rows] of one layer, of a tensor that holds all of them one after the other.
ggml_tensor* GraphInput::layer_view(const llm_graph_context& graph, ggml_tensor* of, int64_t n_rows,
                                    int32_t slot) const {
    const size_t begin = state_.slot_begin[static_cast<size_t>(slot)];
    const size_t n_expert = state_.slot_begin[static_cast<size_t>(slot) + 1] - begin;
    return ggml_view_2d(graph.ctx0, of, static_cast<int64_t>(n_expert), n_rows, n_expert * sizeof(float),
                        begin * static_cast<size_t>(n_rows) * sizeof(float));
}

// Without this copy a device would receive every layer's view as an input of its own, and the scheduler takes only so
// many per split.
ggml_tensor* GraphInput::on_device(const llm_graph_context& graph, ggml_tensor* input) const {
    return state_.offloaded ? ggml_cont(graph.ctx0, input) : input;
}

ggml_tensor* GraphInput::mask(const llm_graph_context& graph, int64_t n_rows, int il) {
    if (!masked_) return nullptr;
    if (n_rows != n_tokens_ && n_rows != n_outputs_) {
        throw Error("layer " + std::to_string(il) + " routes " + std::to_string(n_rows) +
                    " rows, which are neither the tokens nor the outputs of the micro-batch");
    }
    const auto n_total = static_cast<int64_t>(state_.slot_begin.back());
    Rows& rows = n_rows == n_tokens_ ? of_tokens_ : of_outputs_;
    rows.n = n_rows;
    const int32_t slot = state_.slot_of_layer[static_cast<size_t>(il)];
    rows.slots.push_back(slot);
    if (n_rows <= kDirectRows) {
        if (!rows.direct) {
            rows.direct = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, n_total, n_rows);
            ggml_set_input(rows.direct);
            ggml_set_name(rows.direct, "moeshard_mask");
            rows.on_device = on_device(graph, rows.direct);
        }
        return layer_view(graph, rows.on_device, n_rows, slot);
    }
    if (!table_.input) {
        table_.input = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, n_total, capacity_ + 1);
        ggml_set_input(table_.input);
        ggml_set_name(table_.input, "moeshard_masks");
        table_.on_device = on_device(graph, table_.input);
    }
    if (!rows.index) {
        rows.index = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I32, n_rows);
        ggml_set_input(rows.index);
        ggml_set_name(rows.index, "moeshard_mask_rows");
    }
    return ggml_get_rows(graph.ctx0, layer_view(graph, table_.on_device, capacity_ + 1, slot), rows.index);
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
    if (table_.input) set_table();
    for (const Rows* rows : {&of_tokens_, &of_outputs_}) {
        if (rows->index) set_index(*rows, *ubatch);
        if (rows->direct) set_direct(*rows, *ubatch);
    }
    for (const HashIds& ids : hashed_) set_hash_ids(ids, *ubatch);
}

std::vector<int32_t> GraphInput::tokens_of(const llama_ubatch& ubatch, int64_t n_rows) {
    std::vector<int32_t> tokens;
    tokens.reserve(static_cast<size_t>(n_rows));
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (n_rows == ubatch.n_tokens || ubatch.output[i]) tokens.push_back(static_cast<int32_t>(i));
    }
    return tokens;
}

void GraphInput::set_table() {
    row_of_.clear();
    std::vector<const MaskRows*> masks;
    const auto add = [&](const MaskRows* mask) {
        if (mask && row_of_.emplace(mask, static_cast<int32_t>(masks.size()) + 1).second) masks.push_back(mask);
    };
    add(state_.mask_of_all.get());
    for (const auto& [seq, mask] : state_.mask_of_seq) add(mask.get());
    auto* data = static_cast<float*>(table_.input->data);
    const auto n_rows = static_cast<size_t>(capacity_) + 1;
    for (size_t slot = 0; slot + 1 < state_.slot_begin.size(); ++slot) {
        const size_t begin = state_.slot_begin[slot];
        const size_t n_expert = state_.slot_begin[slot + 1] - begin;
        float* layer = data + begin * n_rows;
        std::memset(layer, 0, n_rows * n_expert * sizeof(float));
        for (size_t i = 0; i < masks.size(); ++i) {
            std::memcpy(layer + (i + 1) * n_expert, masks[i]->rows.data() + begin, n_expert * sizeof(float));
        }
    }
}

// A token that belongs to several sequences is computed once, under the mask of the first.
void GraphInput::set_index(const Rows& rows, const llama_ubatch& ubatch) const {
    auto* out = static_cast<int32_t*>(rows.index->data);
    for (const int32_t token : tokens_of(ubatch, rows.n)) {
        const MaskRows* mask = state_.mask(ubatch.seq_id[token][0]);
        *out++ = mask ? row_of_.at(mask) : 0;
    }
}

void GraphInput::set_direct(const Rows& rows, const llama_ubatch& ubatch) const {
    const auto n_rows = static_cast<size_t>(rows.n);
    std::vector<const MaskRows*> masks;
    masks.reserve(n_rows);
    for (const int32_t token : tokens_of(ubatch, rows.n)) masks.push_back(state_.mask(ubatch.seq_id[token][0]));
    auto* data = static_cast<float*>(rows.direct->data);
    for (const int32_t slot : rows.slots) {
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
    for (const int32_t token : tokens_of(ubatch, ids.input->ne[1])) {
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
