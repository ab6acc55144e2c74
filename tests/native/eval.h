// What oracle does with the tensors that stock llama.cpp shows to the eval callback while it computes.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "llama.h"

// "ffn_moe_probs-7" is {"ffn_moe_probs", 7}. Nothing else matches: a reshaped view of that tensor is called
// "ffn_moe_probs-7 (reshaped)" and has another shape.
struct layer_tensor {
    std::string name;
    int32_t layer;
};
std::optional<layer_tensor> parse_name(const ggml_tensor* tensor);

// One sequence of the batch. `keep` is n_layer rows of n_expert, or empty: all.
struct sequence {
    std::vector<llama_token> tokens;
    std::vector<uint8_t> keep;
};

// Drops experts: their router scores become -inf as they pass, and hash-routed layers get other ids.
class gate {
public:
    gate(const llama_model* model, const std::vector<sequence>& sequences);

    bool active() const { return any_keep; }
    bool wants(const layer_tensor& id, const ggml_tensor* tensor) const;
    void change(const layer_tensor& id, ggml_tensor* tensor) const;

private:
    const std::vector<sequence>& sequences;
    uint32_t n_expert;
    uint32_t n_groups;
    int32_t n_hash_layers;

    bool any_keep = false;

    const uint8_t* keep_of(int32_t layer, int64_t row) const;
    void drop_scores(int32_t layer, ggml_tensor* scores) const;
    void replace_ids(int32_t layer, ggml_tensor* ids) const;
};

// Collects the routing of every layer.
class recorder {
public:
    explicit recorder(bool norms) : norms(norms) {}

    void begin_ubatch() { seen.clear(); }
    bool wants(const layer_tensor& id) const;
    void record(const layer_tensor& id, const ggml_tensor* tensor);
    void write(const std::string& dir);

private:
    struct layer_trace {
        std::vector<int32_t> ids;    // n_tokens x n_expert_used
        std::vector<float> weights;  // the same
        std::vector<float> norms;    // the same
        size_t begin = 0;            // where the present micro-batch begins in these three
        std::vector<float> probs;    // n_tokens x n_expert
    };
    const bool norms;
    std::map<int32_t, layer_trace> layers;
    std::map<int32_t, int> seen;  // how often each layer has chosen experts in this micro-batch
};

void write_file(const std::string& path, const void* data, size_t n_bytes);

template <typename T>
void write_file(const std::string& path, const std::vector<T>& data) {
    write_file(path, data.data(), data.size() * sizeof(T));
}
