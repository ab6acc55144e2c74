// Whether files that say that they are of one model are.
#pragma once

#include <vector>

#include "shard/holder.hpp"

namespace moeshard::shard {

// Throws Error, naming tensor and expert, where `file` and an earlier one hold different bytes of what both hold: the
// trunk, which is in every whole shard, and experts that several have. Looks at some places of each tensor and expert,
// so that no file is read for it: two fine-tunings of a model differ in nearly all bytes of what was trained.
void check_alike(const gguf::GGUFMap& trunk, const gguf::GGUFMap& file);
void check_alike(const std::vector<Holder>& earlier, const Holder& file);

}  // namespace moeshard::shard
