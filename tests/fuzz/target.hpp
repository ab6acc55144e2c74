// What is fuzzed, for the driver that comes with it; libFuzzer needs LLVMFuzzerTestOneInput() alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace fuzz {

// Errors, their numbers and names left out, and checks that were reached, with how often. An input that adds one has
// come to a place that none before it had.
const std::map<std::string, uint64_t>& reached();

// Shards of the good models, whole and in parts, trunks and files of experts: inputs to begin with.
std::vector<std::string> shard_inputs();

// Removes the target's temporary files; may be called from a signal handler.
void remove_files();

}  // namespace fuzz
