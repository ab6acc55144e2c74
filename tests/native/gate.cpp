#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "eval.h"
#include "ggml-backend.h"

std::optional<layer_tensor> parse_name(const ggml_tensor* tensor) {
    const std::string name = tensor->name;
    const size_t dash = name.rfind('-');
    if (name.compare(0, 8, "ffn_moe_") != 0 || dash == std::string::npos || dash + 1 == name.size() ||
        name.find_first_not_of("0123456789", dash + 1) != std::string::npos) {
        return std::nullopt;
    }
    return layer_tensor{name.substr(0, dash), std::atoi(name.c_str() + dash + 1)};
}

static uint32_t metadata(const llama_model* model, const std::string& key) {
    char arch[64] = "";
    char value[64] = "0";
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));
    llama_model_meta_val_str(model, (arch + ("." + key)).c_str(), value, sizeof(value));
    return std::strtoul(value, nullptr, 10);
}

gate::gate(const llama_model* model, const std::vector<sequence>& sequences)
    : sequences(sequences),
      n_expert(metadata(model, "expert_count")),
      n_groups(metadata(model, "expert_group_count")),
      n_hash_layers(metadata(model, "hash_layer_count")) {
    for (const sequence& one : sequences) {
        any_keep = any_keep || !one.keep.empty();
    }
}

// Scores are changed before gating. Where experts are selected by other numbers than the gated scores, those are
// changed too: a selection bias would lift a dropped expert, whose score is 0 after a sigmoid, above kept ones; and
// in grouped selection that 0 would count for its group.
bool gate::wants(const layer_tensor& id, const ggml_tensor* tensor) const {
    if (!any_keep) {
        return false;
    }
    if (id.layer < n_hash_layers) {
        return id.name == "ffn_moe_topk";
    }
    // With a softmax over the selected experts only, the scores themselves go by this name.
    const bool ungated = tensor->op == GGML_OP_MUL_MAT || tensor->op == GGML_OP_ADD;
    return id.name == "ffn_moe_logits" || id.name == "ffn_moe_logits_biased" || id.name == "ffn_moe_probs_biased" ||
           (id.name == "ffn_moe_probs" && (ungated || n_groups > 1));
}

void gate::change(const layer_tensor& id, ggml_tensor* tensor) const {
    if (id.name == "ffn_moe_topk") {
        replace_ids(id.layer, tensor);
    } else {
        drop_scores(id.layer, tensor);
    }
}

// Rows are tokens. Several sequences are equally long and in one micro-batch, one after the other (see oracle.cpp).
const uint8_t* gate::keep_of(int32_t layer, int64_t row) const {
    const size_t which = sequences.size() == 1 ? 0 : row / sequences[0].tokens.size();
    const sequence& owner = sequences.at(which);
    return owner.keep.empty() ? nullptr : owner.keep.data() + size_t(layer) * n_expert;
}

void gate::drop_scores(int32_t layer, ggml_tensor* scores) const {
    GGML_ASSERT(scores->type == GGML_TYPE_F32 && scores->ne[0] == n_expert && ggml_nrows(scores) == scores->ne[1]);
    std::vector<float> row(n_expert);
    for (int64_t i = 0; i < scores->ne[1]; i++) {
        const uint8_t* keep = keep_of(layer, i);
        if (keep == nullptr) {
            continue;
        }
        ggml_backend_tensor_get(scores, row.data(), i * scores->nb[1], n_expert * sizeof(float));
        for (uint32_t expert = 0; expert < n_expert; expert++) {
            if (!keep[expert]) {
                row[expert] = -INFINITY;
            }
        }
        ggml_backend_tensor_set(scores, row.data(), i * scores->nb[1], n_expert * sizeof(float));
    }
}

// Every dropped id of a token becomes the next kept id, upward and cyclically, that the token does not use: neither
// among the ids it keeps, nor among those that replaced others.
void gate::replace_ids(int32_t layer, ggml_tensor* ids) const {
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t));
    std::vector<int32_t> row(ids->ne[0]);
    for (int64_t i = 0; i < ids->ne[1]; i++) {
        const uint8_t* keep = keep_of(layer, i);
        if (keep == nullptr) {
            continue;
        }
        ggml_backend_tensor_get(ids, row.data(), i * ids->nb[1], row.size() * sizeof(int32_t));
        std::set<int32_t> used;
        std::copy_if(row.begin(), row.end(), std::inserter(used, used.end()), [&](int32_t id) { return keep[id]; });
        for (int32_t& id : row) {
            while (!keep[id]) {
                int32_t next = id;
                do {
                    next = (next + 1) % int32_t(n_expert);
                } while (!keep[next] || used.count(next));
                id = next;
                used.insert(id);
            }
        }
        ggml_backend_tensor_set(ids, row.data(), i * ids->nb[1], row.size() * sizeof(int32_t));
    }
}
