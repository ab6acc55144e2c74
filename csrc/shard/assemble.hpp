// Lays a GGUF out as segments: header, tensor directory, data. The one place that knows the order of its bytes.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "moeshard/segments.hpp"

namespace moeshard::shard {

struct FileRange {
    std::shared_ptr<const gguf::Mapping> file;
    gguf::ByteRange range;
};

struct NewTable {
    FileRange from;
    ExpertIdTable table;
};

// Bytes of the new file, wherever they come from.
using Piece = std::variant<std::string, FileRange, NewTable>;

struct NewTensor {
    std::string name;
    uint32_t type = 0;
    uint32_t n_dims = 0;
    std::array<uint64_t, 4> ne{1, 1, 1, 1};
    uint64_t nbytes = 0;
    std::vector<Piece> data;  // nbytes in all
};

struct NewFile {
    uint32_t version = 3;
    uint64_t alignment = 32;
    std::vector<std::vector<Piece>> entries;  // encoded keys of the metadata
    std::vector<NewTensor> tensors;
};

// One file; or, where that would be larger than `max_file_size` (0: no limit), several as llama.cpp names and numbers
// them (-00001-of-0000N). All files of `models` become sources, also those that nothing is taken from: none may be
// written over. Throws Error where a single tensor is too large for a part.
std::vector<SegmentList> assemble(NewFile file, uint64_t max_file_size, const std::string& name,
                                  const std::vector<const gguf::GGUFMap*>& models);

// GGUF files are little-endian, and so is every machine that runs this.
template <typename T>
std::string number(T value) {
    return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

// Encoded entries of a header.
std::string scalar_entry(std::string_view key, gguf::ValueType type, std::string_view value);
std::string array_entry_head(std::string_view key, gguf::ValueType type, uint64_t count);
std::string string_entry(std::string_view key, std::string_view text);
std::string strings_entry(std::string_view key, const std::vector<std::string>& texts);
std::string uints_entry(std::string_view key, const std::vector<uint32_t>& values);
// `like` with other numbers, in its own type; a single number fills all of its values.
std::string replaced_entry(const gguf::Entry& like, const std::vector<uint64_t>& values);

}  // namespace moeshard::shard
