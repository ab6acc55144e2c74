#include "runtime/workers.hpp"

#include "ggml-rpc.h"

namespace moeshard {

WorkerDevices::WorkerDevices(const ModelParams& params, const Guard& guard, const std::string& name) {
    const size_t n = params.rpc.size();
    if (n > split_.size() || n > llama_max_devices()) {
        throw Error(name + ": " + std::to_string(n) + " workers, llama.cpp takes " + std::to_string(split_.size()) +
                    " at most");
    }
    if (!params.layer_split.empty() && params.layer_split.size() != n) {
        throw Error(name + ": a split into " + std::to_string(params.layer_split.size()) + " parts does not fit " +
                    std::to_string(n) + " workers");
    }
    for (size_t i = 0; i < n; ++i) {
        const std::string& endpoint = params.rpc[i];
        const std::string failed = endpoint + ": could not be connected to";
        ggml_backend_reg_t reg = guard.run(failed, [&] { return ggml_backend_rpc_add_server(endpoint.c_str()); });
        const size_t found = reg == nullptr ? 0 : ggml_backend_reg_dev_count(reg);
        if (found == 0) throw guard.error(failed);
        // A worker's further devices would need splits of their own.
        if (found > 1) throw Error(endpoint + ": has " + std::to_string(found) + " devices; let it serve one of them");
        devices_.push_back(ggml_backend_reg_dev_get(reg, 0));
    }
    if (devices_.empty()) return;
    devices_.push_back(nullptr);
    for (size_t i = 0; i < params.layer_split.size(); ++i) split_[i] = static_cast<float>(params.layer_split[i]);
    // The output counts as a layer, after the last one.
    for (size_t i = n; i-- > 0 && !params.layer_split.empty();) {
        if (split_[i] == 0) continue;
        split_[i] += 1;
        break;
    }
}

void WorkerDevices::use(llama_model_params& native) const {
    if (devices_.empty()) return;
    native.devices = const_cast<ggml_backend_dev_t*>(devices_.data());
    native.split_mode = LLAMA_SPLIT_MODE_LAYER;
    native.tensor_split = split_.data();
    native.n_gpu_layers = -1;
}

}  // namespace moeshard
