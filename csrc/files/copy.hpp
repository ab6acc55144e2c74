// Copying between open files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moeshard/gguf.hpp"

namespace moeshard::files {

// All that write throw Error naming `path`, the file written to.
void write_at(int fd, const std::string& path, uint64_t offset, const uint8_t* data, uint64_t size);

// Takes disk space for bytes that are going to be written, where the file system can: that they do not fit is then
// known at once, and the file lies in one piece.
void reserve(int fd, const std::string& path, uint64_t offset, uint64_t size);

// Whether copying a range would rather share the bytes on the disk than write them, where the file system can.
bool may_share(uint64_t from_offset, uint64_t offset, uint64_t size);

// One for each thread.
class Copier {
public:
    Copier();

    // Copies `size` bytes of `from`, beginning at `from_offset`, to `offset` of the open file. Where the source has a
    // hole, zeros are not written: the target must be new there.
    void copy_range(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path, uint64_t offset,
                    uint64_t size);

private:
    void copy_data(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path, uint64_t offset,
                   uint64_t size);

    void copy_by_reading(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path,
                         uint64_t offset, uint64_t size, bool zeros_too);

    std::vector<uint8_t> buffer_;
};

// Has the bytes read from the disk before they are asked for.
void read_ahead(const gguf::Mapping& from, uint64_t offset, uint64_t size);

}  // namespace moeshard::files
