// The devices of workers on other machines, and which of a model's layers each holds.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"
#include "moeshard/model.hpp"
#include "runtime/guard.hpp"

namespace moeshard {

class WorkerDevices {
public:
    // Connects to the workers of `params`; `name` stands for the model in messages. Throws Error.
    WorkerDevices(const ModelParams& params, const Guard& guard, const std::string& name);

    // Puts all layers on them, where there are any. `native` points into this object.
    void use(llama_model_params& native) const;

private:
    std::vector<ggml_backend_dev_t> devices_;  // ends with null
    std::array<float, 16> split_{};            // the engine reads as many whatever the number of devices
};

}  // namespace moeshard
