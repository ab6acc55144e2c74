// Tensors that a shard holds instead of its model's own.
#pragma once

#include "moeshard/shard.hpp"
#include "shard/assemble.hpp"

namespace moeshard::shard {

// Puts what `corrected` names in the place of the tensors of these names. Throws Error where `file` has no such tensor,
// or one of another shape.
void replace_tensors(NewFile& file, const Corrected& corrected);

}  // namespace moeshard::shard
