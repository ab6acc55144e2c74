// Parsing what has been read of a file so far.
#pragma once

#include <cstdint>
#include <string>

#include "moeshard/gguf.hpp"

namespace moeshard::gguf {

// Thrown where the bytes end within the header, though the file does not.
struct HeaderGoesOn {
    uint64_t needed;  // bytes from the beginning of the file on, at least
};

// As parse(), which takes no less than the whole header.
Directory parse_beginning(Bytes bytes, const std::string& name, uint64_t file_size);

}  // namespace moeshard::gguf
