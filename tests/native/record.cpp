#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "eval.h"
#include "ggml-backend.h"

static const std::set<std::string> kWeights = {"ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm",
                                               "ffn_moe_weights_scaled"};
static const std::set<std::string> kOutputs = {"ffn_moe_down", "ffn_moe_down_scaled", "ffn_moe_down_biased"};

bool recorder::wants(const layer_tensor &id) const {
    return id.name == "ffn_moe_topk" || id.name == "ffn_moe_probs" || kWeights.count(id.name) ||
           (norms && kOutputs.count(id.name));
}

// The values in memory order, whichever strides the tensor has.
template <typename T>
static std::vector<T> values(const ggml_tensor *tensor) {
    const size_t row = tensor->ne[0] * sizeof(T);
    std::vector<T> out(ggml_nelements(tensor));
    char *to = reinterpret_cast<char *>(out.data());
    for (int64_t k = 0; k < tensor->ne[2]; k++) {
        for (int64_t j = 0; j < tensor->ne[1]; j++, to += row) {
            ggml_backend_tensor_get(tensor, to, k * tensor->nb[2] + j * tensor->nb[1], row);
        }
    }
    return out;
}

template <typename T>
static void put(std::vector<T> &all, size_t begin, const std::vector<T> &some) {
    all.resize(begin);
    all.insert(all.end(), some.begin(), some.end());
}

// Weights and outputs are renamed or made anew step by step: the last before they are used is what counts.
// GroveMoE chooses a second time in each layer, for its chunk experts: that is not recorded.
void recorder::record(const layer_tensor &id, const ggml_tensor *tensor) {
    layer_trace &layer = layers[id.layer];
    if (id.name == "ffn_moe_topk") {
        if (seen[id.layer]++ == 0) {
            layer.begin = layer.ids.size();
            put(layer.ids, layer.begin, values<int32_t>(tensor));
        }
    } else if (id.name == "ffn_moe_probs") {
        if (seen[id.layer] == 0) {
            put(layer.probs, layer.probs.size(), values<float>(tensor));
        }
    } else if (seen[id.layer] != 1) {
        return;
    } else if (kWeights.count(id.name)) {
        put(layer.weights, layer.begin, values<float>(tensor));
    } else {
        const std::vector<float> outputs = values<float>(tensor);
        std::vector<float> lengths;
        for (auto at = outputs.begin(); at != outputs.end(); at += tensor->ne[0]) {
            double sum = 0.0;
            for (int64_t i = 0; i < tensor->ne[0]; i++) {
                sum += double(at[i]) * at[i];
            }
            lengths.push_back(std::sqrt(sum));
        }
        put(layer.norms, layer.begin, lengths);
    }
}

void write_file(const std::string &path, const void *data, size_t n_bytes) {
    FILE *file = fopen(path.c_str(), "wb");
    const bool ok = file != nullptr && fwrite(data, 1, n_bytes, file) == n_bytes;
    if (file == nullptr || fclose(file) != 0 || !ok) {
        throw std::runtime_error("cannot write " + path);
    }
}

void recorder::write(const std::string &dir) {
    std::vector<int32_t> numbers;
    std::vector<int32_t> ids;
    std::vector<float> weights;
    std::vector<float> probs;
    std::vector<float> lengths;
    for (const auto &[number, layer] : layers) {
        numbers.push_back(number);
        put(ids, ids.size(), layer.ids);
        put(weights, weights.size(), layer.weights);
        put(probs, probs.size(), layer.probs);
        put(lengths, lengths.size(), layer.norms);
    }
    write_file(dir + "/layers.i32", numbers);
    write_file(dir + "/ids.i32", ids);
    write_file(dir + "/weights.f32", weights);
    write_file(dir + "/probs.f32", probs);
    if (norms) {
        write_file(dir + "/norms.f32", lengths);
    }
}
