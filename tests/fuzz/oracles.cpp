#include "oracles.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "moeshard/moe_layout.hpp"

namespace fuzz {

using namespace moeshard;
using gguf::Directory;
using gguf::Entry;
using gguf::Tensor;

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "NOT TRUE: %s\n", what);
    std::abort();
}

void check_directory(const Directory& directory, uint64_t header_size, uint64_t file_size) {
    uint64_t at = directory.metadata.offset;
    for (const Entry& entry : directory.entries) {
        require(entry.range.offset == at, "entries follow each other");
        require(entry.value.size <= entry.range.size, "a value lies in its entry");
        at = entry.range.end();
    }
    require(at == directory.metadata.end() && at == directory.infos.offset, "metadata ends where tensors begin");
    for (const Tensor& tensor : directory.tensors) {
        require(tensor.info.offset == at, "tensor infos follow each other");
        at = tensor.info.end();
    }
    require(at == directory.infos.end() && at <= header_size, "the header is what was given");
    require(directory.tensors.empty() || directory.data_offset >= at, "data begins after the header");

    std::vector<const Tensor*> order;
    for (const Tensor& tensor : directory.tensors) {
        __extension__ unsigned __int128 bytes = tensor.row_bytes;
        for (const size_t i : {1, 2, 3}) bytes *= tensor.ne[i];
        require(bytes == tensor.nbytes, "a tensor is as large as its rows");
        require(tensor.offset >= directory.data_offset && tensor.offset <= file_size &&
                    tensor.nbytes <= file_size - tensor.offset,
                "a tensor lies in the file");
        require(tensor.offset % directory.alignment == 0, "a tensor is aligned");
        if (tensor.nbytes > 0) order.push_back(&tensor);
    }
    std::sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < order.size(); ++i) {
        require(order[i - 1]->offset + order[i - 1]->nbytes <= order[i]->offset, "tensors do not overlap");
    }
}

namespace {

template <typename Read>
void may_fail(Read read) {
    try {
        read();
    } catch (const Error&) {
    }
}

}  // namespace

void check_accessors(const Directory& directory) {
    for (const Entry& entry : directory.entries) {
        require(directory.find(entry.key) == &entry, "a key is found");
        may_fail([&] { entry.as_uint(); });
        may_fail([&] { entry.as_int(); });
        may_fail([&] { entry.as_float(); });
        may_fail([&] { entry.as_bool(); });
        may_fail([&] { entry.as_string(); });
        may_fail([&] { require(entry.as_uints().size() == entry.count, "an array is whole"); });
        may_fail([&] { require(entry.as_strings().size() == entry.count, "an array of strings is whole"); });
    }
    for (const Tensor& tensor : directory.tensors) require(tensor.type_name() != nullptr, "a type has a name");
}

void check_segments(const SegmentList& list) {
    uint64_t at = 0;
    for (const Segment& segment : list.segments()) {
        require(segment.offset == at, "segments follow each other");
        require(segment.size <= UINT64_MAX - at, "segments end somewhere");
        at += segment.size;
        if (segment.kind == Segment::Kind::kLiteral) {
            require(segment.from <= list.literals().size() && segment.size <= list.literals().size() - segment.from,
                    "a literal exists");
        } else if (segment.kind != Segment::Kind::kZeros) {
            require(segment.source < list.sources().size(), "a source exists");
            const uint64_t size = list.sources()[segment.source]->size();
            const bool is_range = segment.kind == Segment::Kind::kRange;
            require(segment.from <= size && (!is_range || segment.size <= size - segment.from), "a range exists");
        }
    }
    require(at == list.size() && list.header_size() <= at, "a file is its segments");
}

Directory directory_of(const SegmentList& list, std::string& header) {
    header.resize(list.header_size());
    auto* bytes = reinterpret_cast<uint8_t*>(header.data());
    list.read(0, bytes, header.size());
    Directory directory = gguf::parse({bytes, header.size()}, "made", list.size());
    check_directory(directory, header.size(), list.size());
    return directory;
}

namespace {

uint32_t kept_in(uint32_t layer, const MoeLayout& layout, const Keep& keep) {
    const uint8_t* row = keep.row(static_cast<int32_t>(layer));
    return static_cast<uint32_t>(std::count(row, row + layout.n_expert, 1));
}

uint32_t used_in(uint32_t layer, const MoeLayout& layout, const Keep& keep, const ShardParams& params) {
    uint32_t used = layout.n_expert_used[layer];
    if (used != 0 && params.n_expert_used != 0) used = params.n_expert_used;
    if (!params.clamp) return used;
    for (const uint32_t other : layout.moe_layers) {
        if (layout.n_expert_used[other] != 0) used = std::min(used, kept_in(other, layout, keep));
    }
    return used;
}

// What of the model's tensor a shard has; empty where the shard does not have it.
std::vector<uint64_t> expected_shape(const Tensor& tensor, const ExpertTensor* expert, const MoeLayout& layout,
                                     const Keep& keep, const ShardParams& params) {
    const bool wanted = expert == nullptr ? params.kind != ShardKind::kExperts : params.kind != ShardKind::kTrunk;
    if (!wanted) return {};
    std::vector<uint64_t> ne(tensor.ne.begin(), tensor.ne.end());
    if (expert == nullptr) return ne;
    const uint64_t kept = kept_in(expert->layer, layout, keep);
    if (expert->role == Role::kExpertIds) {
        ne[0] = std::min<uint64_t>(ne[0], used_in(expert->layer, layout, keep, params));
    } else {
        ne[static_cast<size_t>(expert->axis)] =
            expert->role == Role::kChunkSlab ? kept / layout.experts_per_chunk : kept;
    }
    return ne;
}

}  // namespace

void check_shard(const gguf::GGUFMap& model, const MoeLayout& layout, const Keep& keep, const ShardParams& params,
                 const std::vector<SegmentList>& shard) {
    std::vector<std::string> headers(shard.size());
    std::vector<Tensor> tensors;
    Directory first;
    for (size_t i = 0; i < shard.size(); ++i) {
        Directory directory = directory_of(shard[i], headers[i]);
        require(params.max_file_size == 0 || shard.size() == 1 || shard[i].size() <= params.max_file_size,
                "a part is not too large");
        tensors.insert(tensors.end(), directory.tensors.begin(), directory.tensors.end());
        if (i == 0) first = std::move(directory);
    }
    auto found = tensors.begin();
    auto expert = layout.tensors.begin();
    for (size_t i = 0; i < model.tensors().size(); ++i) {
        const bool is_expert = expert != layout.tensors.end() && expert->tensor == i;
        const Tensor& tensor = model.tensors()[i];
        const auto ne = expected_shape(tensor, is_expert ? &*expert : nullptr, layout, keep, params);
        if (is_expert) ++expert;
        if (ne.empty()) continue;
        require(found != tensors.end() && found->name == tensor.name, "a shard has the model's tensors in order");
        require(found->type == tensor.type && found->n_dims == tensor.n_dims, "a tensor of a shard is of its type");
        require(std::equal(ne.begin(), ne.end(), found->ne.begin()), "a tensor of a shard has the kept experts");
        ++found;
    }
    require(found == tensors.end(), "a shard has no other tensors");
    const MoeLayout own = moe_layout(first, tensors, "made");
    if (params.kind == ShardKind::kTrunk) return;
    require(own.tensors.size() == layout.tensors.size() && own.moe_layers == layout.moe_layers,
            "a shard's experts are found again");
    for (const uint32_t layer : layout.moe_layers) {
        require(own.experts_in(layer) == kept_in(layer, layout, keep), "a shard counts its experts");
        require(own.n_expert_used[layer] == used_in(layer, layout, keep, params),
                "a shard counts the experts of a token");
    }
}

void check_same(const gguf::GGUFMap& model, const std::vector<SegmentList>& files) {
    std::string header;
    size_t i = 0;
    for (const SegmentList& file : files) {
        const Directory directory = directory_of(file, header);
        if (&file == &files.front()) {
            for (const Entry& entry : model.metadata().entries) {
                if (entry.key.rfind("moeshard.", 0) == 0 || entry.key.rfind("split.", 0) == 0) continue;
                const Entry* other = directory.find(entry.key);
                require(other != nullptr && other->type == entry.type && other->count == entry.count &&
                            other->value.size == entry.value.size &&
                            std::memcmp(other->value.data, entry.value.data, entry.value.size) == 0,
                        "a merged file has the model's metadata");
            }
        }
        for (const Tensor& tensor : directory.tensors) {
            require(i < model.tensors().size(), "a merged file has no more tensors than the model");
            const Tensor& other = model.tensors()[i++];
            require(tensor.name == other.name && tensor.ne == other.ne && tensor.type == other.type,
                    "a merged file has the model's tensors in order");
            std::vector<uint8_t> bytes(tensor.nbytes);
            file.read(tensor.offset, bytes.data(), bytes.size());
            require(bytes.empty() || std::memcmp(bytes.data(), model.data(other).get(), bytes.size()) == 0,
                    "a merged tensor has the model's bytes");
        }
    }
    require(i == model.tensors().size(), "a merged file has all tensors");
}

}  // namespace fuzz
