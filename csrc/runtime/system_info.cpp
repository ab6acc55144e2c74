#include "ggml-backend.h"
#include "llama.h"
#include "moeshard/model.hpp"
#include "runtime/guard.hpp"

namespace moeshard {

SystemInfo system_info() {
    const Guard guard;  // the engine is set up with the first one
    SystemInfo info;
    info.llama_cpp = MOESHARD_LLAMA_PIN;
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        ggml_backend_reg_t backend = ggml_backend_reg_get(i);
        info.backends.emplace_back(ggml_backend_reg_name(backend));
        const auto features = reinterpret_cast<ggml_backend_get_features_t>(
            ggml_backend_reg_get_proc_address(backend, "ggml_backend_get_features"));
        if (features == nullptr) continue;
        for (const ggml_backend_feature* feature = features(backend); feature->name != nullptr; ++feature) {
            const std::string value = feature->value;
            if (value == "0") continue;
            info.features.push_back(value == "1" ? feature->name : feature->name + ("=" + value));
        }
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        info.devices.push_back(std::string(ggml_backend_dev_name(device)) + ": " +
                               ggml_backend_dev_description(device));
    }
    return info;
}

}  // namespace moeshard
