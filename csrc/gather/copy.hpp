// Copying between open files.
#pragma once

#include <cstdint>
#include <string>

#include "moeshard/gguf.hpp"

namespace moeshard::gather {

// All of these throw Error naming `path`, the file written to.
void write_at(int fd, const std::string& path, uint64_t offset, const uint8_t* data, uint64_t size);

// Copies `size` bytes of `from`, beginning at `from_offset`, to `offset` of the open file. Where the source has a hole
// nothing is written: the target must be new there.
void copy_range(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path, uint64_t offset,
                uint64_t size);

// Where the next data of the file begins, at or after `offset`, and where it ends; `end` twice if there is none before.
gguf::ByteRange next_data(int fd, uint64_t offset, uint64_t end);

}  // namespace moeshard::gather
