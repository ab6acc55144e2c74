#include "shard/facts.hpp"

#include <algorithm>
#include <cstring>

#include "gguf/checked.hpp"
#include "shard/counts.hpp"

namespace moeshard {

namespace {

using namespace shard;
using gguf::Entry;

constexpr const char* kKindNames[] = {"shard", "trunk", "experts"};

class Reader {
public:
    explicit Reader(const gguf::GGUFMap& file) : file_(file) {}

    [[noreturn]] void fail(std::string_view key, const std::string& what) const {
        throw Error(file_.path() + ": " + std::string(key) + " " + what + "; the file is damaged, write it again");
    }

    const Entry& entry(std::string_view key) const {
        const Entry* found = file_.metadata().find(key);
        if (found == nullptr) fail(key, "is missing");
        return *found;
    }

    template <typename Read>
    auto get(std::string_view key, Read read) const {
        const Entry& found = entry(key);
        try {
            return read(found);
        } catch (const Error& error) {
            throw Error(file_.path() + ": " + error.what());
        }
    }

    std::vector<uint64_t> uints(std::string_view key) const {
        return get(key, [](const Entry& found) { return found.as_uints(); });
    }

    // Ascending numbers below `limit`.
    void check_ids(std::string_view key, const uint64_t* begin, const uint64_t* end, uint64_t limit) const {
        for (const uint64_t* id = begin; id != end; ++id) {
            if (*id >= limit || (id != begin && *id <= id[-1])) fail(key, "does not hold ascending numbers in range");
        }
    }

private:
    const gguf::GGUFMap& file_;
};

}  // namespace

const char* name(ShardKind kind) { return kKindNames[static_cast<size_t>(kind)]; }

std::optional<ShardFacts> shard_facts(const gguf::GGUFMap& file) {
    if (file.metadata().find(kKind) == nullptr) return std::nullopt;
    const Reader reader(file);
    const auto kind = reader.get(kKind, [](const Entry& found) { return std::string(found.as_string()); });
    const auto* at = std::find(std::begin(kKindNames), std::end(kKindNames), kind);
    if (at == std::end(kKindNames)) {
        reader.fail(kKind, "is '" + gguf::printable(kind) + "', which this moeshard does not know");
    }
    const MoeLayout layout = moe_layout(file);
    ShardFacts facts;
    facts.kind = static_cast<ShardKind>(at - std::begin(kKindNames));
    facts.n_layer = layout.n_layer;
    const uint64_t n_expert = reader.get(kExpertCount, [](const Entry& found) { return found.as_uint(); });
    constexpr uint64_t kMostExperts = 65536;
    if (n_expert == 0 || n_expert > kMostExperts) reader.fail(kExpertCount, "is out of range");
    facts.n_expert = static_cast<uint32_t>(n_expert);
    const std::vector<uint64_t> layers = reader.uints(kLayers);
    reader.check_ids(kLayers, layers.data(), layers.data() + layers.size(), layout.n_layer);
    facts.layers.assign(layers.begin(), layers.end());
    if (facts.kind != ShardKind::kTrunk && facts.layers != expert_layers(layout)) {
        reader.fail(kLayers, "does not name the layers of which the file holds experts");
    }

    facts.keep.assign(static_cast<size_t>(facts.n_layer) * facts.n_expert, 1);
    const std::vector<uint64_t> kept = facts.kind == ShardKind::kTrunk ? std::vector<uint64_t>() : reader.uints(kKept);
    size_t n_kept = 0;
    for (const uint32_t layer : facts.layers) n_kept += facts.kind == ShardKind::kTrunk ? 0 : layout.experts_in(layer);
    if (kept.size() != n_kept) reader.fail(kKept, "does not hold as many ids for each layer as the file has experts");
    const uint64_t* ids = kept.data();
    for (const uint32_t layer : facts.layers) {
        const size_t n_keep = facts.kind == ShardKind::kTrunk ? 0 : layout.experts_in(layer);
        reader.check_ids(kKept, ids, ids + n_keep, n_expert);
        uint8_t* row = facts.keep.data() + layer * n_expert;
        std::fill(row, row + n_expert, 0);
        for (size_t j = 0; j < n_keep; ++j) row[ids[j]] = 1;
        ids += n_keep;
    }
    for (const Entry& entry : file.metadata().entries) {
        const bool is_own = entry.key == kKind || entry.key == kLayers || entry.key == kKept || entry.key == kCounts ||
                            entry.key == kTensors || entry.key == kExpertCount || starts_with(entry.key, kSource) ||
                            starts_with(entry.key, kRouter);
        facts.has_router = facts.has_router || starts_with(entry.key, kRouter);
        if (!starts_with(entry.key, kPrefix) || is_own) continue;
        const std::string_view text = reader.get(entry.key, [](const Entry& found) { return found.as_string(); });
        if (!gguf::is_utf8(text)) reader.fail(entry.key, "is not valid UTF-8");
        facts.notes.emplace_back(entry.key.substr(kPrefix.size()), text);
    }
    return facts;
}

namespace shard {

std::vector<std::vector<Piece>> fact_entries(const ShardFacts& facts) {
    std::vector<std::vector<Piece>> entries;
    const auto add = [&](std::string entry) { entries.emplace_back().emplace_back(std::move(entry)); };
    add(string_entry(kKind, name(facts.kind)));
    const uint32_t count = facts.n_expert;
    add(scalar_entry(kExpertCount, gguf::ValueType::kUint32, {reinterpret_cast<const char*>(&count), sizeof(count)}));
    add(uints_entry(kLayers, facts.layers));
    if (facts.kind != ShardKind::kTrunk) {
        std::vector<uint32_t> kept;
        std::vector<uint32_t> counts;
        for (const uint32_t layer : facts.layers) {
            const size_t before = kept.size();
            for (uint32_t i = 0; i < count; ++i) {
                if (facts.keep[static_cast<size_t>(layer) * count + i]) kept.push_back(i);
            }
            counts.push_back(static_cast<uint32_t>(kept.size() - before));
        }
        add(uints_entry(kKept, kept));
        const bool equal = std::all_of(counts.begin(), counts.end(), [&](uint32_t n) { return n == counts.front(); });
        if (!equal) add(uints_entry(kCounts, counts));
    }
    for (const auto& [key, text] : facts.notes) add(string_entry(std::string(kPrefix) + key, text));
    return entries;
}

}  // namespace shard

}  // namespace moeshard
