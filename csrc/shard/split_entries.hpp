// What a model said of being divided, kept in the notes of its shards.
#pragma once

#include <string>
#include <string_view>

#include "moeshard/shard.hpp"
#include "shard/assemble.hpp"

namespace moeshard::shard {

// Puts the entries of the note `text` into `entries`, those of a model without them, each where the model had it.
// Throws Error where the text is none that split_entries() makes; `name` stands for the shard.
void insert_split_entries(std::string_view text, const std::string& name, std::vector<std::vector<Piece>>& entries);

}  // namespace moeshard::shard
