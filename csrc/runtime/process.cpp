#include "moeshard/process.hpp"

#include "files/threads.hpp"
#include "runtime/guard.hpp"

namespace moeshard {

void take_over_engine_callbacks() { install_callbacks(); }

int default_threads(const std::string& root) { return files::usable_processors(root); }

}  // namespace moeshard
