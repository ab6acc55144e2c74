// Numbers in the types of a GGUF, made by ggml's own functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moeshard::gguf {

// The ggml_type that is called `name` ("q8_0") and that float32 can be turned into. Throws Error, naming those that
// there are.
uint32_t quantizable_type(const std::string& name);

// `rows` rows of `n` numbers, as bytes of the type. `importance` (n, or null): how much an error of each number of a
// row counts, for the types that look at that; some need it. Throws Error where rows are no whole blocks of the type.
std::string quantize(uint32_t type, const float* values, uint64_t rows, uint64_t n, const float* importance = nullptr);

// The float32 values of `n` numbers of the type. Throws Error where `size` is not what they take.
std::vector<float> dequantize(uint32_t type, const uint8_t* bytes, uint64_t size, uint64_t n);

}  // namespace moeshard::gguf
