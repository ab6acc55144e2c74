#include "write_model.h"

#include <cstring>
#include <set>
#include <stdexcept>

#include "ggml-cpp.h"
#include "llama-model.h"

namespace {

class writer {
public:
    writer(const specimen &what, const gguf_context *meta, uint32_t n_layer)
        : what(what), out(gguf_init_empty()), last(n_layer - 1) {
        // Room for the tensors that are not written as they are in memory.
        tensors.reset(ggml_init({1u << 26, nullptr, false}));
        gguf_set_kv(out.get(), meta);
    }

    void add(const ggml_tensor *tensor) {
        const std::string name = tensor->name;
        // Tied embeddings and rope factors are in the map more than once.
        if (!seen.insert(name).second || (!what.drop.empty() && name.find(what.drop) != std::string::npos)) {
            return;
        }
        // llama.cpp does not look for the optional scales of a block that it does not load, and then has some left.
        if (name.rfind(unscaled, 0) == 0 && name.find("scale") != std::string::npos) {
            return;
        }
        const std::string merged = "ffn_gate_up_exps.weight";
        const size_t at = name.find(merged);
        if (at != std::string::npos && !what.fused) {
            const std::string prefix = name.substr(0, at);
            add_expert(half(tensor, 0), prefix + "ffn_gate_exps.weight");
            add_expert(half(tensor, 1), prefix + "ffn_up_exps.weight");
        } else if (is_expert_tensor(name)) {
            n_fused += at != std::string::npos;
            add_expert(tensor, name);
        } else {
            gguf_add_tensor(out.get(), tensor);
        }
    }

    // The last block, as it is, becomes one that a draft of a further token runs through.
    void add_nextn(const llama_model &model) {
        const llm_arch arch = what.arch;
        const int64_t n_embd = model.hparams.n_embd;
        gguf_set_val_u32(out.get(), LLM_KV(arch)(LLM_KV_NEXTN_PREDICT_LAYERS).c_str(), 1);
        add_zeros(LLM_TN(arch)(LLM_TENSOR_NEXTN_EH_PROJ, "weight", last), 2 * n_embd, n_embd);
        add_zeros(LLM_TN(arch)(LLM_TENSOR_NEXTN_ENORM, "weight", last), n_embd, 1);
        add_zeros(LLM_TN(arch)(LLM_TENSOR_NEXTN_HNORM, "weight", last), n_embd, 1);
    }

    bool save(const char *path) const { return gguf_write_to_file(out.get(), path, /*only_meta=*/false); }

    size_t n_expert_tensors = 0;
    size_t n_fused = 0;

private:
    const specimen &what;
    gguf_context_ptr out;
    const uint32_t last;
    const std::string unscaled = what.nextn ? "blk." + std::to_string(last) + "." : "?";
    ggml_context_ptr tensors;
    std::set<std::string> seen;

    // The rows of gate (0) or of up (1), expert by expert.
    const ggml_tensor *half(const ggml_tensor *both, int which) {
        const int64_t n_row = both->ne[1] / 2;
        ggml_tensor *one = ggml_new_tensor_3d(tensors.get(), both->type, both->ne[0], n_row, both->ne[2]);
        for (int64_t expert = 0; expert < both->ne[2]; expert++) {
            const char *from =
                static_cast<const char *>(both->data) + expert * both->nb[2] + which * n_row * both->nb[1];
            memcpy(static_cast<char *>(one->data) + expert * one->nb[2], from, one->nb[2]);
        }
        return one;
    }

    void add_zeros(const std::string &name, int64_t n_col, int64_t n_row) {
        ggml_tensor *one = n_row == 1 ? ggml_new_tensor_1d(tensors.get(), GGML_TYPE_F32, n_col)
                                      : ggml_new_tensor_2d(tensors.get(), GGML_TYPE_F32, n_col, n_row);
        ggml_set_name(one, name.c_str());
        ggml_set_zero(one);
        gguf_add_tensor(out.get(), one);
    }

    void add_expert(const ggml_tensor *tensor, const std::string &name) {
        ggml_tensor *one = ggml_new_tensor(tensors.get(), what.experts, GGML_MAX_DIMS, tensor->ne);
        ggml_set_name(one, name.c_str());
        GGML_ASSERT(tensor->type == GGML_TYPE_F32 && ggml_is_contiguous(tensor));
        if (tensor->ne[0] % ggml_blck_size(what.experts) != 0) {
            throw std::runtime_error(name + " has rows of " + std::to_string(tensor->ne[0]) +
                                     " elements, no blocks of " + ggml_type_name(what.experts));
        }
        ggml_quantize_chunk(what.experts, static_cast<const float *>(tensor->data), one->data, 0, ggml_nrows(tensor),
                            tensor->ne[0], nullptr);
        gguf_add_tensor(out.get(), one);
        n_expert_tensors++;
    }
};

}  // namespace

bool write_model(const specimen &what, const gguf_context *meta, const llama_model *model, const char *path) {
    writer file(what, meta, model->hparams.n_layer_all);
    for (const auto &[name, tensor] : llama_internal_get_tensor_map(model)) {
        file.add(tensor);
    }
    if (file.n_expert_tensors == 0) {
        return false;
    }
    if (what.fused && file.n_fused == 0) {
        throw std::runtime_error(what.name + " has no tensor that holds gate and up");
    }
    if (what.nextn) {
        file.add_nextn(*model);
    }
    if (!file.save(path)) {
        throw std::runtime_error(std::string("cannot write ") + path);
    }
    return true;
}
