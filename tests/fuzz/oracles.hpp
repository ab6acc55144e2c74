// What must hold of everything that the library accepts. All of them end the process where it does not.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moeshard/gguf.hpp"
#include "moeshard/shard.hpp"

namespace fuzz {

void require(bool holds, const char* what);

// Entries and tensors lie where they should, tensors do not overlap.
void check_directory(const moeshard::gguf::Directory& directory, uint64_t header_size, uint64_t file_size);

// Every typed accessor of every entry, and every message about a tensor: a value or an Error.
void check_accessors(const moeshard::gguf::Directory& directory);

// The segments follow each other without a gap, and each reads what exists.
void check_segments(const moeshard::SegmentList& list);

// The directory of the file that the segments make, which must be a good one.
moeshard::gguf::Directory directory_of(const moeshard::SegmentList& list, std::string& header);

// The shard has the model's tensors with as many experts as `keep` says, and counts them right.
void check_shard(const moeshard::gguf::GGUFMap& model, const moeshard::MoeLayout& layout, const moeshard::Keep& keep,
                 const moeshard::ShardParams& params, const std::vector<moeshard::SegmentList>& shard);

// The file has all of the model's tensors, byte for byte, and its metadata.
void check_same(const moeshard::gguf::GGUFMap& model, const std::vector<moeshard::SegmentList>& files);

}  // namespace fuzz
