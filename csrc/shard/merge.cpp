// Files of one model, put together again.
#include <algorithm>
#include <set>

#include "gguf/checked.hpp"
#include "shard/alike.hpp"
#include "shard/counts.hpp"
#include "shard/facts.hpp"
#include "shard/holder.hpp"
#include "shard/split_entries.hpp"

namespace moeshard {

namespace {

using namespace shard;
using gguf::Entry;
using gguf::GGUFMap;

ShardFacts facts_of(const GGUFMap& file) {
    std::optional<ShardFacts> facts = shard_facts(file);
    if (!facts)
        throw Error(file.path() + ": is not a shard: it says nothing about experts held (" + std::string(kKind) + ")");
    return std::move(*facts);
}

const std::string* note(const ShardFacts& facts, const std::string& key) {
    const auto at = std::find_if(facts.notes.begin(), facts.notes.end(), [&](const auto& n) { return n.first == key; });
    return at == facts.notes.end() ? nullptr : &at->second;
}

// Fingerprints are HEAD.SAMPLES; older files have the head alone.
bool same_fingerprint(const std::string& a, const std::string& b) {
    const size_t end_a = a.find('.');
    const size_t end_b = b.find('.');
    if (end_a != a.npos && end_b != b.npos) return a == b;
    return a.compare(0, end_a, b, 0, end_b) == 0;
}

void check_same_model(const GGUFMap& a, const ShardFacts& facts_a, const GGUFMap& b, const ShardFacts& facts_b) {
    const std::string* mark_a = note(facts_a, "fingerprint");
    const std::string* mark_b = note(facts_b, "fingerprint");
    const bool same_marks = mark_a == nullptr || mark_b == nullptr || same_fingerprint(*mark_a, *mark_b);
    if (!same_marks || facts_a.n_layer != facts_b.n_layer || facts_a.n_expert != facts_b.n_expert ||
        facts_a.layers != facts_b.layers) {
        throw Error(b.path() + ": was taken from another model than " + a.path());
    }
}

// Names of the model's tensors, in the order in which the model has them.
std::vector<std::string> tensor_order(const GGUFMap& provider, const ShardFacts& facts,
                                      const std::vector<Holder>& holders) {
    std::vector<std::string> names;
    if (facts.kind != ShardKind::kTrunk) {
        for (const gguf::Tensor& tensor : provider.tensors()) names.push_back(tensor.name);
        return names;
    }
    const auto fail = [&](const std::string& what) {
        throw Error(provider.path() + ": " + std::string(kTensors) + " " + what +
                    "; the file is damaged, write it again");
    };
    const Entry* entry = provider.metadata().find(kTensors);
    if (entry == nullptr) fail("is missing");
    try {
        for (const std::string_view name : entry->as_strings()) names.emplace_back(name);
    } catch (const Error& error) {
        throw Error(provider.path() + ": " + error.what());
    }
    std::set<std::string> listed;
    for (const std::string& name : names) {
        if (!listed.insert(name).second) fail("names '" + gguf::printable(name) + "' twice");
    }
    const auto check = [&](const GGUFMap& file) {
        for (const gguf::Tensor& tensor : file.tensors()) {
            if (listed.count(tensor.name) == 0) fail("does not name '" + gguf::printable(tensor.name) + "'");
        }
    };
    check(provider);
    for (const Holder& holder : holders) check(holder.map());
    return names;
}

std::vector<Piece> carried(const GGUFMap& file, const Entry& entry) {
    std::vector<Piece> pieces;
    pieces.emplace_back(FileRange{file.parts().front().mapping, entry.range});
    return pieces;
}

// The model's own value of a key that the shard replaced; nothing where it did not.
const Entry* original_of(const GGUFMap& shard, const ShardFacts& facts, const Entry& entry) {
    const Entry* original = shard.metadata().find(std::string(kSource) + entry.key);
    if (original == nullptr) return nullptr;
    const bool like = original->type == entry.type && original->is_array == entry.is_array &&
                      original->count == entry.count && original->type != gguf::ValueType::kString;
    const Entry* arch = shard.metadata().find("general.architecture");
    const bool is_count = arch != nullptr && entry.key == std::string(arch->as_string()) + ".expert_count";
    if (!like || (is_count && original->as_uint() != facts.n_expert)) {
        throw Error(shard.path() + ": " + gguf::printable(original->key) +
                    " is no earlier value of that key; the file is damaged, write it again");
    }
    return original;
}

// `provider` has the trunk; `keep` says what the new file holds. The entries are left to the caller.
NewFile put_together(const GGUFMap& provider, const ShardFacts& facts, const std::vector<Holder>& holders,
                     const std::vector<uint8_t>& keep, const std::vector<uint32_t>& n_expert_used) {
    NewFile file;
    file.version = provider.metadata().version;
    file.alignment = provider.metadata().alignment;
    for (const std::string& name : tensor_order(provider, facts, holders)) {
        const ExpertTensor* expert = nullptr;
        for (const Holder& holder : holders) {
            if (expert == nullptr) expert = holder.find(name);
        }
        if (expert == nullptr) {
            file.tensors.push_back(copy_tensor(provider, provider.tensor(name)));
            continue;
        }
        const uint8_t* row = keep.data() + static_cast<size_t>(expert->layer) * facts.n_expert;
        file.tensors.push_back(gather_tensor(holders, name, row, n_expert_used[expert->layer]));
    }
    return file;
}

// Which experts of `layer` nobody holds: "3, 17, 40 and 12 more".
std::string missing(const std::vector<Holder>& holders, uint32_t layer, uint32_t n_expert) {
    constexpr size_t kShown = 8;
    std::string list;
    size_t n = 0;
    for (uint32_t expert = 0; expert < n_expert; ++expert) {
        const bool held = std::any_of(holders.begin(), holders.end(),
                                      [&](const Holder& holder) { return holder.holds(layer, expert); });
        if (held) continue;
        if (n < kShown) list += (n == 0 ? "" : ", ") + std::to_string(expert);
        ++n;
    }
    return n > kShown ? list + " and " + std::to_string(n - kShown) + " more" : list;
}

}  // namespace

std::vector<SegmentList> merge_segments(const std::vector<const GGUFMap*>& shards, uint64_t max_file_size) {
    if (shards.empty()) throw Error("there are no shards to merge");
    std::vector<Holder> holders;
    const GGUFMap* provider = nullptr;
    ShardFacts first;
    for (const GGUFMap* shard : shards) {
        ShardFacts facts = facts_of(*shard);
        if (note(facts, kCorrectedNote) != nullptr) {
            throw Error(shard->path() +
                        ": some of its tensors were corrected for the experts that it holds, so they are not the "
                        "model's own any more; merge shards that were split without a recovery");
        }
        if (shard == shards.front()) first = facts;
        check_same_model(*shards.front(), first, *shard, facts);
        if (provider != nullptr) check_alike(*provider, *shard);
        if (provider == nullptr && facts.kind != ShardKind::kExperts) provider = shard;
        if (facts.kind == ShardKind::kTrunk) continue;
        Holder holder(*shard, facts.keep, facts.n_expert);
        check_alike(holders, holder);
        holders.push_back(std::move(holder));
    }
    if (provider == nullptr)
        throw Error(shards.front()->path() + ": holds experts only; the file of the trunk is missing");
    for (const uint32_t layer : first.layers) {
        const std::string ids = missing(holders, layer, first.n_expert);
        if (!ids.empty()) {
            throw Error("these shards do not make a whole model: in layer " + std::to_string(layer) +
                        " none of them holds experts " + ids);
        }
    }
    const std::vector<uint8_t> all(static_cast<size_t>(first.n_layer) * first.n_expert, 1);
    // Tables are given back in full: no model looks up more experts than it has.
    const std::vector<uint32_t> used(first.n_layer, first.n_expert);
    const ShardFacts provided = facts_of(*provider);
    NewFile file = put_together(*provider, provided, holders, all, used);
    for (const Entry& entry : provider->metadata().entries) {
        if (is_of_file(entry.key)) continue;
        const Entry* original = original_of(*provider, first, entry);
        if (original == nullptr) {
            file.entries.push_back(carried(*provider, entry));
        } else {
            const std::string bytes(reinterpret_cast<const char*>(original->value.data), original->value.size);
            file.entries.emplace_back().emplace_back(
                original->is_array ? array_entry_head(entry.key, original->type, original->count) + bytes
                                   : scalar_entry(entry.key, original->type, bytes));
        }
    }
    // What the model said of being divided is right where this is one file again, and else said anew.
    if (const std::string* text = note(provided, kSplitEntriesNote)) {
        NewFile undivided = file;
        insert_split_entries(*text, provider->path(), undivided.entries);
        std::vector<SegmentList> lists = assemble(std::move(undivided), max_file_size, provider->path(), shards);
        if (lists.size() == 1) return lists;
    }
    return assemble(std::move(file), max_file_size, provider->path(), shards);
}

SegmentList join_segments(const GGUFMap& trunk, const GGUFMap& experts) {
    const ShardFacts trunk_facts = facts_of(trunk);
    ShardFacts facts = facts_of(experts);
    if (trunk_facts.kind != ShardKind::kTrunk) throw Error(trunk.path() + ": is not a trunk, it is a whole shard");
    if (facts.kind != ShardKind::kExperts) {
        throw Error(experts.path() + ": is not a file of experts without the trunk, but a " + name(facts.kind));
    }
    check_same_model(trunk, trunk_facts, experts, facts);
    const std::vector<Holder> holders{{experts, facts.keep, facts.n_expert}};
    NewFile file = put_together(trunk, trunk_facts, holders, facts.keep, holders.front().layout().n_expert_used);
    for (const Entry& entry : trunk.metadata().entries) {
        if (is_of_file(entry.key)) continue;
        const Entry* own = experts.metadata().find(entry.key);
        file.entries.push_back(own == nullptr ? carried(trunk, entry) : carried(experts, *own));
    }
    for (const Entry& entry : experts.metadata().entries) {
        if (!starts_with(entry.key, kPrefix)) continue;
        if (entry.key == kKind) {
            file.entries.emplace_back().emplace_back(string_entry(kKind, name(ShardKind::kShard)));
        } else {
            file.entries.push_back(carried(experts, entry));
        }
    }
    return std::move(assemble(std::move(file), 0, trunk.path(), {&trunk, &experts}).front());
}

}  // namespace moeshard
