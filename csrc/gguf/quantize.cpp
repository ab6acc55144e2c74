#include "moeshard/quantize.hpp"

#include <cstring>

#include "ggml.h"
#include "moeshard/error.hpp"

namespace moeshard::gguf {

namespace {

bool can_be_made(ggml_type type) {
    if (type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16) return true;
    // These two are for activations.
    return ggml_is_quantized(type) && type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K &&
           ggml_get_type_traits(type)->to_float != nullptr;
}

}  // namespace

uint32_t quantizable_type(const std::string& name) {
    std::string names;
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (!can_be_made(type)) continue;
        if (name == ggml_type_name(type)) return static_cast<uint32_t>(type);
        names += (names.empty() ? "" : ", ") + std::string(ggml_type_name(type));
    }
    throw Error("no type '" + name + "' can be made of weights; choose one of " + names);
}

std::string quantize(uint32_t type, const float* values, uint64_t rows, uint64_t n, const float* importance) {
    const auto wanted = static_cast<ggml_type>(type);
    if (type >= GGML_TYPE_COUNT || !can_be_made(wanted)) throw Error("no such type of weights can be made");
    const auto block = static_cast<uint64_t>(ggml_blck_size(wanted));
    if (n == 0 || n % block != 0) {
        throw Error("rows of " + std::to_string(n) + " numbers are no whole blocks of " + std::to_string(block) +
                    ", as type " + ggml_type_name(wanted) + " needs; choose another type");
    }
    if (importance == nullptr && ggml_quantize_requires_imatrix(wanted)) {
        throw Error(std::string("type ") + ggml_type_name(wanted) +
                    " needs to be told how important numbers are; choose another type");
    }
    std::string bytes(rows * ggml_row_size(wanted, static_cast<int64_t>(n)), '\0');
    if (wanted == GGML_TYPE_F32) {
        std::memcpy(bytes.data(), values, bytes.size());
    } else {
        ggml_quantize_chunk(wanted, values, bytes.data(), 0, static_cast<int64_t>(rows), static_cast<int64_t>(n),
                            importance);
    }
    return bytes;
}

std::vector<float> dequantize(uint32_t type, const uint8_t* bytes, uint64_t size, uint64_t n) {
    const auto own = static_cast<ggml_type>(type);
    if (type >= GGML_TYPE_COUNT || !can_be_made(own)) throw Error("this type does not hold weights");
    if (n % static_cast<uint64_t>(ggml_blck_size(own)) != 0 || size != ggml_row_size(own, static_cast<int64_t>(n))) {
        throw Error(std::to_string(size) + " bytes are not " + std::to_string(n) + " numbers of type " +
                    ggml_type_name(own));
    }
    std::vector<float> values(n);
    if (own == GGML_TYPE_F32) {
        std::memcpy(values.data(), bytes, size);
    } else {
        ggml_get_type_traits(own)->to_float(bytes, values.data(), static_cast<int64_t>(n));
    }
    return values;
}

}  // namespace moeshard::gguf
