// Arithmetic that says when it does not fit, and checks of text.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

namespace moeshard::gguf {

// Each leaves the result alone and returns false if it does not fit into 64 bits.
inline bool add(uint64_t a, uint64_t b, uint64_t& sum) {
    if (b > std::numeric_limits<uint64_t>::max() - a) return false;
    sum = a + b;
    return true;
}

inline bool multiply(uint64_t a, uint64_t b, uint64_t& product) {
    if (a != 0 && b > std::numeric_limits<uint64_t>::max() / a) return false;
    product = a * b;
    return true;
}

inline bool is_power_of_two(uint64_t value) { return value != 0 && (value & (value - 1)) == 0; }

// `alignment` is a power of two.
inline bool align_up(uint64_t value, uint64_t alignment, uint64_t& aligned) {
    uint64_t last = 0;
    if (!add(value, alignment - 1, last)) return false;
    aligned = last & ~(alignment - 1);
    return true;
}

bool is_utf8(std::string_view text);

// For messages: what is not printable ASCII becomes \x.., long text is cut.
std::string printable(std::string_view text);

}  // namespace moeshard::gguf
