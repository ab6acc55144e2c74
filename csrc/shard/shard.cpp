#include "moeshard/shard.hpp"

#include <algorithm>

#include "shard/corrected.hpp"
#include "shard/counts.hpp"
#include "shard/facts.hpp"
#include "shard/holder.hpp"

namespace moeshard {

namespace {

using namespace shard;
using gguf::Entry;
using gguf::GGUFMap;

FileRange range_of(const GGUFMap& model, const Entry& entry) { return {model.parts().front().mapping, entry.range}; }

// New values of the counts of experts; nothing where a key keeps its own.
class NewCounts {
public:
    NewCounts(const GGUFMap& model, const MoeLayout& layout, const Counts& counts) {
        set(model, layout.arch + ".expert_count", {counts.n_expert});
        set_used(model, layout, counts);
        if (counts.n_group != 0) {
            set(model, layout.arch + ".expert_group_count", {counts.n_group});
            set(model, layout.arch + ".expert_group_used_count", {counts.n_group_used});
        }
    }

    // nullptr where `key` is not replaced.
    const std::string* find(const std::string& key) const {
        const auto at =
            std::find_if(values_.begin(), values_.end(), [&](const auto& value) { return value.first == key; });
        return at == values_.end() ? nullptr : &at->second;
    }

private:
    void set(const GGUFMap& model, const std::string& key, const std::vector<uint64_t>& values) {
        const Entry* entry = model.metadata().find(key);
        if (entry == nullptr) return;
        const std::vector<uint64_t> own = entry->as_uints();
        const bool same = values.size() == 1
                              ? std::all_of(own.begin(), own.end(), [&](uint64_t v) { return v == values.front(); })
                              : own == values;
        if (same) return;
        try {
            values_.emplace_back(key, replaced_entry(*entry, values));
        } catch (const Error& error) {
            throw Error(model.path() + ": " + error.what());
        }
    }

    // A list keeps the numbers of layers that the shard does not change, those without experts among them; more than
    // there are experts would be refused even there.
    void set_used(const GGUFMap& model, const MoeLayout& layout, const Counts& counts) {
        const std::string key = layout.arch + ".expert_used_count";
        const Entry* entry = model.metadata().find(key);
        if (entry == nullptr) return;
        std::vector<uint64_t> values = entry->as_uints();
        for (size_t i = 0; i < values.size(); ++i) {
            for (uint32_t layer = 0; layer < layout.n_layer; ++layer) {
                const bool applies = !entry->is_array || layer == i;
                if (applies && counts.n_expert_used[layer] != 0) values[i] = counts.n_expert_used[layer];
            }
            values[i] = std::min<uint64_t>(values[i], counts.n_expert);
        }
        set(model, key, values);
    }

    std::vector<std::pair<std::string, std::string>> values_;
};

// The model's own value of a replaced key, under a key of ours.
std::string original_entry(const Entry& entry) {
    const std::string key = std::string(kSource) + entry.key;
    const std::string bytes(reinterpret_cast<const char*>(entry.value.data), entry.value.size);
    return entry.is_array ? array_entry_head(key, entry.type, entry.count) + bytes
                          : scalar_entry(key, entry.type, bytes);
}

std::vector<std::vector<Piece>> entries_of(const GGUFMap& model, const NewCounts& counts, bool with_tokenizer) {
    std::vector<std::vector<Piece>> entries;
    for (const Entry& entry : model.metadata().entries) {
        if (is_of_file(entry.key) || (!with_tokenizer && starts_with(entry.key, "tokenizer."))) continue;
        std::vector<Piece>& pieces = entries.emplace_back();
        if (const std::string* replaced = counts.find(entry.key)) {
            pieces.emplace_back(*replaced);
        } else {
            pieces.emplace_back(range_of(model, entry));
        }
    }
    return entries;
}

// A table of expert ids as the model has it: int32, whatever they were converted to in the shard.
std::vector<Piece> original_table(const GGUFMap& model, const gguf::Tensor& tensor) {
    std::vector<Piece> entry;
    entry.emplace_back(array_entry_head(table_key(tensor.name), gguf::ValueType::kInt32, tensor.nbytes / 4));
    entry.emplace_back(FileRange{model.owner(tensor), {tensor.offset, tensor.nbytes}});
    return entry;
}

// A tensor of a router as the model has it, whatever of it the shard holds.
std::vector<Piece> whole_router(const GGUFMap& model, const gguf::Tensor& tensor) {
    std::vector<Piece> entry;
    entry.emplace_back(array_entry_head(std::string(kRouter) + tensor.name, gguf::ValueType::kUint8, tensor.nbytes));
    entry.emplace_back(FileRange{model.owner(tensor), {tensor.offset, tensor.nbytes}});
    return entry;
}

NewFile empty_like(const GGUFMap& model) {
    NewFile file;
    file.version = model.metadata().version;
    file.alignment = model.metadata().alignment;
    return file;
}

void append(std::vector<std::vector<Piece>>& entries, std::vector<std::vector<Piece>> more) {
    for (auto& entry : more) entries.push_back(std::move(entry));
}

NewFile trunk_file(const GGUFMap& model, const MoeLayout& layout, ShardFacts facts) {
    NewFile file = empty_like(model);
    for (const Entry& entry : model.metadata().entries) {
        if (!is_of_file(entry.key)) file.entries.emplace_back().emplace_back(range_of(model, entry));
    }
    append(file.entries, fact_entries(facts));
    std::vector<std::string> names;
    std::vector<bool> is_trunk(model.tensors().size(), true);
    for (const ExpertTensor& expert : layout.tensors) is_trunk[expert.tensor] = false;
    for (size_t i = 0; i < model.tensors().size(); ++i) {
        const gguf::Tensor& tensor = model.tensors()[i];
        names.push_back(tensor.name);
        if (is_trunk[i]) file.tensors.push_back(copy_tensor(model, tensor));
    }
    file.entries.emplace_back().emplace_back(strings_entry(kTensors, names));
    return file;
}

NewFile shard_file(const GGUFMap& model, const MoeLayout& layout, const Counts& counts, ShardFacts facts) {
    const bool with_trunk = facts.kind == ShardKind::kShard;
    const NewCounts replaced(model, layout, counts);
    NewFile file = empty_like(model);
    file.entries = entries_of(model, replaced, with_trunk);
    append(file.entries, fact_entries(facts));
    for (const Entry& entry : model.metadata().entries) {
        if (replaced.find(entry.key)) file.entries.emplace_back().emplace_back(original_entry(entry));
    }
    const std::vector<uint8_t> all(static_cast<size_t>(layout.n_layer) * layout.n_expert, 1);
    const std::vector<Holder> holders{{model, all, layout.n_expert}};
    for (const gguf::Tensor& tensor : model.tensors()) {
        const ExpertTensor* expert = holders.front().find(tensor.name);
        if (expert == nullptr) {
            if (with_trunk) file.tensors.push_back(copy_tensor(model, tensor));
            continue;
        }
        const uint8_t* row = facts.keep.data() + static_cast<size_t>(expert->layer) * layout.n_expert;
        file.tensors.push_back(gather_tensor(holders, tensor.name, row, counts.n_expert_used[expert->layer]));
        if (expert->role == Role::kExpertIds) file.entries.push_back(original_table(model, tensor));
        const bool routes = expert->role == Role::kRouter || expert->role == Role::kRouterValue;
        if (facts.has_router && routes) file.entries.push_back(whole_router(model, tensor));
    }
    return file;
}

}  // namespace

std::vector<SegmentList> shard_segments(const GGUFMap& model, const Keep& keep, const ShardParams& params) {
    const MoeLayout layout = moe_layout(model);
    if (layout.tensors.empty()) throw Error(model.path() + ": is a dense model: it has no experts to take out");
    if (model.metadata().find(kKind) != nullptr) {
        throw Error(model.path() +
                    ": is itself a shard; take experts out of the whole model, or merge its shards first");
    }
    ShardFacts facts;
    facts.kind = params.kind;
    facts.n_layer = layout.n_layer;
    facts.n_expert = layout.n_expert;
    facts.layers = expert_layers(layout);
    facts.notes = params.notes;
    facts.has_router = params.with_router && params.kind != ShardKind::kTrunk;
    if (facts.has_router && (layout.n_expert_groups > 1 || !layout.hash_layers.empty())) {
        throw Error(
            model.path() +
            ": what tokens miss cannot be measured in a shard of a model that chooses by groups or looks experts "
            "up; write it without its routers");
    }
    const auto laid_out = [&](NewFile file) {
        std::vector<const GGUFMap*> sources{&model};
        if (params.corrected.file) sources.push_back(params.corrected.file.get());
        return assemble(std::move(file), params.max_file_size, model.path(), sources);
    };
    if (params.kind == ShardKind::kTrunk) return laid_out(trunk_file(model, layout, std::move(facts)));
    const Counts counts = count_experts(layout, keep, params, model.path());
    const uint8_t* rows = keep.row(0);
    facts.keep.assign(rows, rows + static_cast<size_t>(layout.n_layer) * layout.n_expert);
    NewFile file = shard_file(model, layout, counts, std::move(facts));
    replace_tensors(file, params.corrected);
    return laid_out(std::move(file));
}

std::string part_path(const std::string& path, size_t index, size_t count) {
    constexpr std::string_view kEnding = ".gguf";
    std::string stem = path;
    if (stem.size() > kEnding.size() && stem.substr(stem.size() - kEnding.size()) == kEnding) {
        stem.resize(stem.size() - kEnding.size());
    }
    char numbers[64];
    std::snprintf(numbers, sizeof(numbers), "-%05zu-of-%05zu.gguf", index + 1, count);
    return stem + numbers;
}

}  // namespace moeshard
