#pragma once

#include <string>

namespace moeshard {

struct CheckedFile {
    std::string first_part;  // of a model in several files, whichever was named
    bool can_be_mapped = true;
};

// Throws Error where `path` is no readable GGUF model, or holds a number that would make the engine abort on one of its
// worker threads, where nothing can be caught.
CheckedFile check_file(const std::string& path);

}  // namespace moeshard
