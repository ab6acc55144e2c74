#pragma once

#include <string>

namespace moeshard {

// Throws Error where `path` is no readable GGUF model, or holds a number that would make the engine abort on one of its
// worker threads, where nothing can be caught.
void check_file(const std::string& path);

}  // namespace moeshard
