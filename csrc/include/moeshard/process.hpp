// What concerns the process as a whole.
#pragma once

#include <string>

namespace moeshard {

// llama.cpp has one log callback and one abort callback per process. A program that calls this gives them to moeshard:
// what the engine says of an error is then part of the Error, the rest is shown on stderr as MOESHARD_LOG (debug, info,
// warn, error) asks, and where the engine would end the process in the middle of a call of this library it throws Error
// instead. Programs that do not call it keep the callbacks that they have; the Python module calls it when it is
// loaded.
void take_over_engine_callbacks();

// How many threads a context uses where nobody says: the least of the processors that this process may run on, the
// physical cores among them, and what its control groups' quotas allow; at least 1. `root` stands before the paths of
// the system's files, for tests.
int default_threads(const std::string& root = "");

}  // namespace moeshard
