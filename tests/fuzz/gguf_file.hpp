// A GGUF taken apart, so that one piece of it can be spoilt and the rest still makes a file.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "moeshard/gguf.hpp"

namespace fuzz {

struct Field {
    std::string key;
    uint32_t type = 0;  // of the value, or of each element of an array
    bool is_array = false;
    uint64_t count = 1;  // as the file says
    std::string value;   // encoded
};

struct TensorInfo {
    std::string name;
    uint32_t n_dims = 0;  // as the file says
    std::vector<uint64_t> ne;
    uint32_t type = 0;
    uint64_t offset = 0;  // in the data
    std::string data;     // the beginning of it; the rest is zeros
};

struct File {
    std::string magic = "GGUF";
    uint32_t version = 3;
    uint64_t alignment = 32;  // of the layout; the key is a field like others
    std::optional<uint64_t> n_fields;
    std::optional<uint64_t> n_tensors;
    std::vector<Field> fields;
    std::vector<TensorInfo> tensors;

    void place();                // tensors one after the other
    std::string bytes() const;   // up to the last byte that is not a hole
    uint64_t file_size() const;  // with the holes
};

// What the fuzz target gets: a file, or two parts of one.
struct Input {
    uint64_t file_size = 0;  // of the only or first part, if larger than its bytes: a hole at its end
    uint32_t cut = 0;        // where the second part begins; 0: there is none
    uint32_t choice = 0;     // seed of everything that is not in the file: which experts to keep, and how
    std::string bytes;

    static constexpr size_t kHead = 16;
    std::string encode() const;
    static Input decode(const uint8_t* data, size_t size);
};

template <typename T>
std::string number(T value) {
    return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

std::string text(std::string_view value);  // its length, then itself

// Bytes of a tensor; 0 where that is not known or no file can be so large.
uint64_t size_of(const TensorInfo& tensor);

// Throws moeshard::Error where `bytes` is no good file.
File take_apart(const std::string& bytes);

// Small models of every kind that a layout knows.
std::vector<File> good_models();

}  // namespace fuzz
