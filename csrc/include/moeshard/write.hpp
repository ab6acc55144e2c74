// Writes and compares files made of segments. The only part of moeshard that writes models.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "moeshard/segments.hpp"

namespace moeshard {

// Called from the calling thread with the bytes done and those of the whole; returning false ends the work, which then
// throws Error.
using ByteProgress = std::function<bool(uint64_t done, uint64_t total)>;

struct Output {
    const SegmentList* segments = nullptr;
    std::string path;
};

struct WriteParams {
    bool force = false;               // replace existing files
    int32_t jobs = 0;                 // threads that copy; 0: as many as are useful
    std::vector<std::string> inputs;  // files beside the sources that were read, and are not written over either
    ByteProgress progress;
};

// Throws Error, naming the path, where a file could not be written there: before the work that it shall hold. That is
// so where something other than a file has the name (a device, a pipe, a socket), where it is one of `inputs` under any
// of its names, where it is a link to nothing, a file exists without `force`, the folder takes no file, or a path
// stands twice. Inputs that do not exist are passed over.
void check_outputs(const std::vector<std::string>& paths, const std::vector<std::string>& inputs, bool force);

// Writes all outputs in one pass over their sources. Each is written beside its place, flushed, and renamed once all
// are complete: under the final names there are whole files or none. Bytes are copied by the kernel where it can
// (sharing extents where the file system does that), holes of sparse sources stay holes. Throws Error, naming the file,
// where one cannot be written (see check_outputs(), with all sources as inputs), and where a source changes meanwhile;
// nothing is left behind then.
void write_files(const std::vector<Output>& outputs, const WriteParams& params = {});

// The first byte of the file at `path` that is not what `segments` says; nothing if there is none. A file of another
// size differs at the end of the shorter one.
std::optional<uint64_t> first_difference(const SegmentList& segments, const std::string& path,
                                         const ByteProgress& progress = {});

}  // namespace moeshard
