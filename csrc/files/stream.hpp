#pragma once

#include <cstdio>
#include <memory>

#include "moeshard/segments.hpp"

namespace moeshard {

struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
};

// A stream for reading that delivers the bytes of `segments`, which must outlive it. Reading fails (ferror) where a
// source can no longer be read.
std::unique_ptr<std::FILE, CloseFile> open_stream(const SegmentList& segments);

}  // namespace moeshard
