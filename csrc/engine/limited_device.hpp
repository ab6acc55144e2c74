// Backends of this machine's devices, whose memory they report as less than it is.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "ggml-backend.h"

namespace moeshard::hook {

// What computes for others: the accelerators, or the CPU where there are none. Freed together.
class LimitedBackends {
public:
    // `memory`: bytes that all of them together say they have; 0: what they have. `n_threads` of the CPU. Throws Error.
    LimitedBackends(size_t memory, int n_threads);
    ~LimitedBackends();
    LimitedBackends(const LimitedBackends&) = delete;
    LimitedBackends& operator=(const LimitedBackends&) = delete;

    std::vector<ggml_backend_t>& all() { return backends_; }

private:
    struct Device;
    std::vector<ggml_backend_t> backends_;
    std::vector<std::unique_ptr<Device>> devices_;
};

}  // namespace moeshard::hook
