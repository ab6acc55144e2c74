// How many threads are of use here.
#pragma once

#include <string>
#include <vector>

namespace moeshard::files {

// The engine takes no more.
inline constexpr int kMostThreads = 512;

// The least of: processors that this process may run on, physical cores among them, and what the quotas of its control
// groups and of all groups above them allow (rounded down); at least 1. More threads than that wait for each other, and
// the engine's wait by spinning. `root` stands before the paths of the system's files, for tests.
int usable_processors(const std::string& root = "");

// Throws Error, naming `what`, where a number of threads that somebody asked for makes no sense. 0: as many as are of
// use.
int threads_wanted(int wanted, const std::string& what);

// How many of `wanted` threads can be started beside the calling one (limits of processes, of memory): tries.
int startable_threads(int wanted);

}  // namespace moeshard::files
