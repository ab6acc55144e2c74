// Everything that computes on the header of a file nobody vouches for: parser, layout, shards, their facts, merging.
#include "target.hpp"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <set>

#include "gguf_file.hpp"
#include "moeshard/shard.hpp"
#include "oracles.hpp"
#include "workspace.hpp"

namespace fuzz {

using namespace moeshard;
using gguf::GGUFMap;

namespace {

constexpr uint64_t kMostFile = uint64_t{1} << 44;
constexpr uint64_t kMostHeader = 1 << 24;  // a table of ids can be as large as a file, and is part of a shard's header
constexpr uint64_t kMostWhole = 1 << 18;   // larger files are not written out

std::map<std::string, uint64_t> places;

// What in a message belongs to the input is left out: what is quoted or in brackets, numbers, and the beginnings of
// keys and paths.
std::string place_of(const std::string& message) {
    std::string text = message;
    const size_t quote = text.find('\'');
    if (quote != text.npos) text.erase(quote, text.rfind('\'') - quote + 1);
    std::string place;
    size_t word = 0;
    bool bracketed = false;
    for (const char c : text) {
        const bool is_digit = std::isdigit(static_cast<unsigned char>(c)) != 0;
        if (c == ' ') word = place.size() + 1;
        if (c == '(' || c == '[') bracketed = true;
        if (c == ')' || c == ']') bracketed = false;
        if (bracketed || (is_digit && !place.empty() && place.back() == '#')) continue;
        if (c == '.' || c == '/') {
            place.resize(std::min(word, place.size()));
        } else {
            place += is_digit ? '#' : c;
        }
        if (place.size() > 3 && place.compare(place.size() - 4, 4, "#, #") == 0) place.resize(place.size() - 3);
    }
    return place;
}

void reach(const std::string& stage, const std::string& message = "") { ++places[stage + ": " + place_of(message)]; }

// False where `work` is refused.
template <typename Work>
bool accepts(const char* stage, Work work) {
    try {
        work();
    } catch (const Error& error) {
        reach(stage, error.what());
        return false;
    }
    reach(stage);
    return true;
}

// What the library made itself, or accepted before, must not be refused.
template <typename Work>
auto must(const char* stage, Work work) {
    try {
        return work();
    } catch (const Error& error) {
        std::fprintf(stderr, "REFUSED: %s: %s\n", stage, error.what());
        std::abort();
    }
}

using Random = std::mt19937;

struct Halves {
    std::vector<uint8_t> keep;
    std::vector<uint8_t> rest;
};

// Equally many experts of each group (or of the whole) in every layer, chosen at random, and the others; now and then
// another number in each layer.
Halves random_halves(const MoeLayout& layout, Random& random) {
    const uint32_t groups = std::max(1U, layout.n_expert_groups);
    const uint32_t size = layout.n_expert / groups;
    const uint32_t n_keep = size == 0 ? 0 : 1 + random() % size;
    Halves halves{std::vector<uint8_t>(size_t{layout.n_layer} * layout.n_expert), {}};
    for (size_t at = 0; size > 0 && at + size <= halves.keep.size(); at += size) {
        std::vector<uint8_t> group(size);
        std::fill_n(group.begin(), n_keep, 1);
        if (layout.experts_per_chunk == 0) std::shuffle(group.begin(), group.end(), random);
        std::copy(group.begin(), group.end(), halves.keep.begin() + static_cast<std::ptrdiff_t>(at));
    }
    if (random() % 16 == 0) halves.keep[random() % halves.keep.size()] ^= 1;
    if (random() % 4 == 0) {
        for (uint8_t& kept : halves.keep) kept = random() % 2;
    }
    for (const uint8_t kept : halves.keep) halves.rest.push_back(kept ? 0 : 1);
    return halves;
}

Keep to_keep(const MoeLayout& layout, const std::vector<uint8_t>& keep) {
    return {static_cast<int32_t>(layout.n_layer), static_cast<int32_t>(layout.n_expert), keep.data()};
}

ShardParams random_params(Random& random) {
    ShardParams params;
    params.kind = static_cast<ShardKind>(random() % 3);
    params.clamp = random() % 2 == 0;
    if (random() % 8 == 0) params.n_expert_used = 1 + random() % (random() % 2 == 0 ? 9 : 300);
    if (random() % 4 == 0) params.max_file_size = 1 << (8 + random() % 8);
    params.per_layer = random() % 2 == 0;
    if (random() % 2 == 0) params.notes = {{"fingerprint", "of the model"}};
    return params;
}

std::string whole(const SegmentList& list) {
    std::string bytes(list.size(), '\0');
    list.read(0, reinterpret_cast<uint8_t*>(bytes.data()), bytes.size());
    return bytes;
}

SegmentList shard_of(const GGUFMap& model, const Keep& keep, ShardKind kind) {
    ShardParams params;
    params.kind = kind;
    params.clamp = true;
    params.per_layer = true;
    return std::move(shard_segments(model, keep, params).front());
}

std::string roles(const MoeLayout& layout) {
    std::set<std::string> names;
    for (const ExpertTensor& tensor : layout.tensors) names.insert(name(tensor.role));
    std::string list;
    for (const std::string& name : names) list += " " + name;
    return list;
}

// Both halves give the model back, and a trunk and experts a half.
void check_round_trip(const GGUFMap& model, const MoeLayout& layout, const Halves& halves) {
    std::vector<std::string> files;
    const bool written = accepts("halves", [&] {
        const Keep keep = to_keep(layout, halves.keep);
        files.push_back(whole(shard_of(model, keep, ShardKind::kShard)));
        files.push_back(whole(shard_of(model, to_keep(layout, halves.rest), ShardKind::kShard)));
        files.push_back(whole(shard_of(model, keep, ShardKind::kTrunk)));
        files.push_back(whole(shard_of(model, keep, ShardKind::kExperts)));
    });
    if (!written) return;
    must("the shards of a model", [&] {
        std::deque<GGUFMap> maps;
        for (const std::string& bytes : files) maps.push_back(workspace().open({bytes}, 0));
        const auto facts = shard_facts(maps[0]);
        require(facts && facts->n_expert == layout.n_expert && facts->n_layer == layout.n_layer,
                "a shard says what it is");
        for (const uint32_t layer : facts->layers) {
            const auto row = static_cast<std::ptrdiff_t>(size_t{layer} * layout.n_expert);
            require(std::equal(facts->keep.begin() + row, facts->keep.begin() + row + layout.n_expert,
                               halves.keep.begin() + row),
                    "a shard says what it holds");
        }
        check_same(model, merge_segments({&maps[0], &maps[1]}));
        check_same(model, merge_segments({&maps[1], &maps[3], &maps[2]}));
        require(whole(join_segments(maps[2], maps[3])) == files[0], "a trunk and experts are the shard");
    });
    reach("round trip" + std::string(layout.n_expert_groups > 1 ? " of groups with" : " with") + roles(layout));
}

void check_shards(const GGUFMap& model, const MoeLayout& layout, uint64_t file_size, uint32_t choice) {
    Random random(choice);
    const Halves halves = random_halves(layout, random);
    const Keep keep = to_keep(layout, halves.keep);
    const ShardParams params = random_params(random);
    std::vector<SegmentList> shard;
    if (!accepts("shard", [&] { shard = shard_segments(model, keep, params); })) return;
    for (const SegmentList& list : shard) {
        check_segments(list);
        if (list.header_size() > kMostHeader) return;
    }
    must("a shard", [&] { check_shard(model, layout, keep, params, shard); });
    reach(std::string("good ") + name(params.kind) + (shard.size() > 1 ? " in parts with" : " with") + roles(layout));
    if (file_size <= kMostWhole && model.parts().size() == 1) check_round_trip(model, layout, halves);
}

struct Partner {
    GGUFMap map;
    ShardFacts facts;
};

// Good shards that an input can be merged with.
const std::vector<Partner>& partners() {
    static const std::vector<Partner> opened = [] {
        std::vector<Partner> list;
        for (const std::string& bytes : shard_inputs()) {
            const Input input = Input::decode(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
            if (input.cut != 0) continue;
            GGUFMap map = workspace().open({input.bytes}, 0);
            ShardFacts facts = must("a shard", [&] { return shard_facts(map).value(); });
            list.push_back({std::move(map), std::move(facts)});
        }
        return list;
    }();
    return opened;
}

// What is merged from a shard that nobody vouches for need not be a good file, but must read what exists.
void check_merged(const char* stage, const std::vector<SegmentList>& lists) {
    for (const SegmentList& list : lists) {
        check_segments(list);
        accepts(stage, [&] {
            if (list.size() <= kMostWhole) whole(list);
            std::string header;
            if (list.header_size() <= kMostHeader) directory_of(list, header);
        });
    }
}

void check_merges(const GGUFMap& file, const ShardFacts& facts) {
    accepts("merged alone", [&] { check_merged("read alone", merge_segments({&file})); });
    for (const Partner& partner : partners()) {
        if (partner.facts.n_layer != facts.n_layer || partner.facts.n_expert != facts.n_expert) continue;
        const GGUFMap* const both[] = {&file, &partner.map};
        accepts("merged", [&] { check_merged("read merged", merge_segments({both[0], both[1]})); });
        accepts("merged", [&] { check_merged("read merged", merge_segments({both[1], both[0]})); });
        const bool is_trunk = facts.kind == ShardKind::kTrunk;
        accepts("joined", [&] {
            std::vector<SegmentList> lists;
            lists.push_back(join_segments(*both[is_trunk ? 0 : 1], *both[is_trunk ? 1 : 0]));
            check_merged("read joined", lists);
        });
    }
}

// Two shards, instead of two parts of one.
void check_pair(const std::vector<std::string>& parts) {
    accepts("pair", [&] {
        const GGUFMap first = workspace().open({parts[0]}, 0);
        const GGUFMap second = workspace().open({parts[1]}, 0);
        check_merged("read pair", merge_segments({&first, &second}));
    });
}

void run(const Input& input) {
    std::vector<std::string> parts{input.bytes};
    if (input.cut > 0 && input.cut < input.bytes.size()) {
        parts = {input.bytes.substr(0, input.cut), input.bytes.substr(input.cut)};
    }
    const std::string& first = parts.front();
    const uint64_t file_size = std::max<uint64_t>(first.size(), std::min(input.file_size, kMostFile));

    // From memory of the exact size, where reading past the end is noticed.
    gguf::Directory directory;
    const std::vector<uint8_t> exact(first.begin(), first.end());
    const bool parsed = accepts("parse", [&] {
        directory = gguf::parse({exact.data(), exact.size()}, "input", file_size);
    });
    if (!parsed) return;
    check_directory(directory, exact.size(), file_size);
    check_accessors(directory);
    MoeLayout layout;
    const bool laid_out = accepts("layout", [&] { layout = moe_layout(directory, directory.tensors, "input"); });
    if (!laid_out && parts.size() == 1) return;

    const bool is_pair =
        parts.size() > 1 && directory.find("moeshard.kind") != nullptr && directory.find("split.count") == nullptr;
    if (is_pair) {
        check_pair(parts);
        return;
    }
    std::optional<GGUFMap> map;
    if (!accepts("open", [&] { map.emplace(workspace().open(parts, input.file_size == 0 ? 0 : file_size)); })) return;
    if (parts.size() > 1 && !accepts("layout", [&] { layout = moe_layout(*map); })) return;
    std::optional<ShardFacts> facts;
    if (!accepts("facts", [&] { facts = shard_facts(*map); })) return;
    if (facts) {
        check_merges(*map, *facts);
    } else if (!layout.tensors.empty()) {
        check_shards(*map, layout, file_size, input.choice);
    }
}

}  // namespace

const std::map<std::string, uint64_t>& reached() { return places; }

std::vector<std::string> shard_inputs() {
    std::vector<std::string> inputs;
    for (const File& model : good_models()) {
        const GGUFMap map = workspace().open({model.bytes()}, model.file_size());
        const MoeLayout layout = moe_layout(map);
        if (layout.tensors.empty()) continue;
        std::vector<uint8_t> half(size_t{layout.n_layer} * layout.n_expert);
        const uint32_t group = layout.n_expert / std::max(1U, layout.n_expert_groups);
        for (size_t i = 0; i < half.size(); ++i) half[i] = i % group < (group + 1) / 2 ? 1 : 0;
        std::vector<uint8_t> rest;
        for (const uint8_t kept : half) rest.push_back(kept ? 0 : 1);
        std::string before;
        const auto add = [&](const std::vector<uint8_t>& keep, ShardKind kind) {
            accepts("seed", [&] {
                const std::string bytes = whole(shard_of(map, to_keep(layout, keep), kind));
                inputs.push_back(Input{0, 0, 0, bytes}.encode());
                if (!before.empty()) {
                    inputs.push_back(Input{0, static_cast<uint32_t>(before.size()), 0, before + bytes}.encode());
                }
                before = bytes;
            });
        };
        add(half, ShardKind::kShard);
        add(rest, ShardKind::kShard);
        add(half, ShardKind::kTrunk);
        add(rest, ShardKind::kExperts);
        add(half, ShardKind::kExperts);
        std::vector<uint8_t> unequal = half;
        std::fill_n(unequal.begin(), layout.n_expert, 1);
        add(unequal, ShardKind::kShard);
        add(unequal, ShardKind::kExperts);

        ShardParams params;
        params.clamp = true;
        params.max_file_size = shard_of(map, to_keep(layout, half), ShardKind::kShard).size() - 1;
        accepts("seed", [&] {
            const auto parts = shard_segments(map, to_keep(layout, half), params);
            const std::string first = whole(parts.front());
            inputs.push_back(Input{0, static_cast<uint32_t>(first.size()), 0, first + whole(parts.back())}.encode());
        });
    }
    return inputs;
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        fuzz::run(fuzz::Input::decode(data, size));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "NOT AN Error OF THE LIBRARY: %s\n", error.what());
        std::abort();
    }
    return 0;
}
