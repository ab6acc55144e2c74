// What a context and its model take.
#pragma once

#include <cstdint>

namespace moeshard {

// Bytes.
struct MemoryUse {
    uint64_t model = 0;    // weights
    uint64_t context = 0;  // keys and values of attention, or other state
    uint64_t compute = 0;  // intermediate results
};

}  // namespace moeshard
