#include "engine/limited_device.hpp"

#include <algorithm>

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "moeshard/error.hpp"

namespace moeshard::hook {

// The device itself with another answer to one question.
struct LimitedBackends::Device : ggml_backend_device {
    Device(ggml_backend_dev_t device, size_t limit) : ggml_backend_device(*device), real(device), limit(limit) {
        iface.get_memory = [](ggml_backend_dev_t self, size_t* free, size_t* total) {
            const auto* own = static_cast<const Device*>(self);
            ggml_backend_dev_memory(own->real, free, total);
            *total = std::min(*total, own->limit);
            *free = std::min(*free, own->limit);
        };
    }

    ggml_backend_dev_t real;
    size_t limit;
};

LimitedBackends::LimitedBackends(size_t memory, int n_threads) {
    std::vector<ggml_backend_dev_t> found;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        const auto type = ggml_backend_dev_type(device);
        if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) found.push_back(device);
    }
    if (found.empty()) found.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    for (ggml_backend_dev_t device : found) {
        ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
        if (backend == nullptr) {
            throw Error(std::string(ggml_backend_dev_name(device)) + ": this device could not be started");
        }
        backends_.push_back(backend);
        if (ggml_backend_is_cpu(backend)) ggml_backend_cpu_set_n_threads(backend, n_threads);
        if (memory != 0) {
            devices_.push_back(std::make_unique<Device>(device, memory / found.size()));
            backend->device = devices_.back().get();
        }
    }
}

LimitedBackends::~LimitedBackends() {
    for (ggml_backend_t backend : backends_) ggml_backend_free(backend);
}

}  // namespace moeshard::hook
