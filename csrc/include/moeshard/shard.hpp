// Shards: the trunk of a model with some of its experts, as segments of the model's own file. Pure: nothing is read but
// headers, nothing is written.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moeshard/keep.hpp"
#include "moeshard/moe_layout.hpp"
#include "moeshard/segments.hpp"

namespace moeshard {

enum class ShardKind {
    kShard,    // trunk and kept experts: an ordinary model
    kTrunk,    // what all shards of a model have in common
    kExperts,  // kept experts and their router rows; a model together with the trunk
};

const char* name(ShardKind kind);

// Tensors of a file that a shard holds instead of its model's, by name: of the shape that they have in the shard, in
// any type.
struct Corrected {
    std::shared_ptr<const gguf::GGUFMap> file;
    std::vector<std::string> names;
};

struct ShardParams {
    ShardKind kind = ShardKind::kShard;
    uint32_t n_expert_used = 0;  // experts per token that the shard asks for; 0: as the model does
    bool clamp = false;          // where fewer experts are kept than a token uses, use those
    // Layers may keep different numbers of experts. Only moeshard loads such a shard, stock llama.cpp refuses it.
    bool per_layer = false;
    uint64_t max_file_size = 0;  // bytes; a larger shard becomes several parts. 0: always one file
    // Write the whole routers down in the metadata, so that what tokens miss can be measured: see Context::missed.
    bool with_router = false;
    // Further texts to write down in the metadata, each under "moeshard." and its name.
    std::vector<std::pair<std::string, std::string>> notes;
    Corrected corrected;  // not for a trunk
};

// The files of the shard of `model` that holds `keep`. A keep of kTrunk is not looked at. The metadata is that of the
// model, but for the counts of experts, and says under "moeshard." what is held and what the counts were. Throws Error
// where the keep does not fit (see Keep::check), where layers keep unequal numbers of experts (a GGUF has one count for
// all layers) and that was not asked for, where expert groups do, and where no shard computes what the masked model
// does.
std::vector<SegmentList> shard_segments(const gguf::GGUFMap& model, const Keep& keep, const ShardParams& params = {});

// The note of a shard that holds corrected tensors: it can be merged with no other.
inline constexpr const char* kCorrectedNote = "corrected";

// A tensor that is not in a file yet.
struct LiteralTensor {
    std::string name;
    uint32_t type = 0;  // a ggml_type
    uint32_t n_dims = 0;
    std::array<uint64_t, 4> ne{1, 1, 1, 1};
    std::string bytes;
};

// A GGUF of these texts, by key, and tensors; `name` stands for it in messages.
SegmentList tensor_file(const std::vector<std::pair<std::string, std::string>>& entries,
                        std::vector<LiteralTensor> tensors, const std::string& name);

// The name of a note, and its text for `model`: what a model in one file says of being divided. llama-gguf-split leaves
// such entries ("split.count" and others) when it puts parts together. In shards they are out of place; a merge of
// shards with this note gives them back. "" where there are none, or where the model is in parts.
inline constexpr const char* kSplitEntriesNote = "split_entries";
std::string split_entries(const gguf::GGUFMap& model);

// What a shard, a trunk or a file of experts says about itself.
struct ShardFacts {
    ShardKind kind = ShardKind::kShard;
    uint32_t n_layer = 0;
    uint32_t n_expert = 0;         // of the whole model
    std::vector<uint32_t> layers;  // those with experts
    std::vector<uint8_t> keep;     // (n_layer, n_expert); all of it 1 in layers without experts, 0 for a trunk
    bool has_router = false;       // the whole routers are written down
    std::vector<std::pair<std::string, std::string>> notes;
};

// Nothing for a model that is no shard. Throws Error where the facts contradict the file.
std::optional<ShardFacts> shard_facts(const gguf::GGUFMap& file);

// The whole model, from shards that together hold every expert (or from a trunk and files of experts). Throws Error
// where experts are missing or the files are of different models.
std::vector<SegmentList> merge_segments(const std::vector<const gguf::GGUFMap*>& shards, uint64_t max_file_size = 0);

// The shard that a trunk and a file of experts make: the bytes that shard_segments() gives for kShard.
SegmentList join_segments(const gguf::GGUFMap& trunk, const gguf::GGUFMap& experts);

// Where `path` ("model.gguf") is written as `count` parts, the name of part `index` (from 0).
std::string part_path(const std::string& path, size_t index, size_t count);

}  // namespace moeshard
