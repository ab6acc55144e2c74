#include "shard/alike.hpp"

#include <algorithm>
#include <array>

#include "gguf/checked.hpp"

namespace moeshard::shard {

namespace {

constexpr uint64_t kSampleBytes = 256;
constexpr uint64_t kPlaces = 16;  // of a tensor of the trunk

using gguf::GGUFMap;
using gguf::Tensor;

[[noreturn]] void fail(const GGUFMap& a, const GGUFMap& b, const std::string& what) {
    throw Error(b.path() + ": was taken from another model than " + a.path() + ": " + what +
                " differs; give shards of one model");
}

// Whether `size` bytes at `at` of both are equal.
bool same_bytes(const GGUFMap& a, uint64_t at_a, const Tensor& in_a, const GGUFMap& b, uint64_t at_b,
                const Tensor& in_b, uint64_t size) {
    std::array<uint8_t, kSampleBytes> bytes_a;
    std::array<uint8_t, kSampleBytes> bytes_b;
    a.owner(in_a)->read(in_a.offset + at_a, bytes_a.data(), size);
    b.owner(in_b)->read(in_b.offset + at_b, bytes_b.data(), size);
    return std::equal(bytes_a.begin(), bytes_a.begin() + static_cast<std::ptrdiff_t>(size), bytes_b.begin());
}

// Places spread over `size` bytes, both ends included.
template <typename Visit>
void visit_places(uint64_t size, uint64_t count, const Visit& visit) {
    const uint64_t n = std::min(size, kSampleBytes);
    const uint64_t room = size - n;
    for (uint64_t i = 0; i < count; ++i) {
        visit(count == 1 ? room / 2 : room / (count - 1) * i, n);
        if (room == 0) return;
    }
}

bool counts_experts(const ExpertTensor* facts) {
    return facts != nullptr && facts->axis >= 0 && facts->role != Role::kChunkSlab;
}

// Of an expert that both hold, the number of its slice in each.
void check_experts(const Holder& a, const ExpertTensor& in_a, const Holder& b, const ExpertTensor& in_b) {
    const Tensor& tensor_a = a.map().tensors()[in_a.tensor];
    const Tensor& tensor_b = b.map().tensors()[in_b.tensor];
    if (in_a.slice_bytes != in_b.slice_bytes) return;  // said better where they are put together
    uint64_t number_a = 0;
    uint64_t number_b = 0;
    for (uint32_t expert = 0; expert < a.n_expert(); ++expert) {
        const bool held_a = a.holds(in_a.layer, expert);
        const bool held_b = b.holds(in_a.layer, expert);
        if (held_a && held_b && number_a < in_a.count && number_b < in_b.count) {
            visit_places(in_a.slice_bytes, 3, [&](uint64_t at, uint64_t size) {
                if (!same_bytes(a.map(), number_a * in_a.slice_bytes + at, tensor_a, b.map(),
                                number_b * in_b.slice_bytes + at, tensor_b, size)) {
                    fail(a.map(), b.map(),
                         "expert " + std::to_string(expert) + " of tensor '" + gguf::printable(tensor_a.name) + "'");
                }
            });
        }
        number_a += held_a;
        number_b += held_b;
    }
}

}  // namespace

void check_alike(const GGUFMap& trunk, const GGUFMap& file) {
    const MoeLayout layout = moe_layout(trunk);
    auto expert = layout.tensors.begin();
    for (size_t i = 0; i < trunk.tensors().size(); ++i) {
        if (expert != layout.tensors.end() && expert->tensor == i) {
            ++expert;
            continue;
        }
        const Tensor& tensor = trunk.tensors()[i];
        const Tensor* other = file.find(tensor.name);
        if (other == nullptr) continue;
        const std::string what = "tensor '" + gguf::printable(tensor.name) + "'";
        if (tensor.type != other->type || tensor.nbytes != other->nbytes) fail(trunk, file, what);
        visit_places(tensor.nbytes, kPlaces, [&](uint64_t at, uint64_t size) {
            if (!same_bytes(trunk, at, tensor, file, at, *other, size)) fail(trunk, file, what);
        });
    }
}

void check_alike(const std::vector<Holder>& earlier, const Holder& file) {
    for (const Holder& holder : earlier) {
        for (const ExpertTensor& facts : holder.layout().tensors) {
            const ExpertTensor* other = file.find(holder.map().tensors()[facts.tensor].name);
            if (counts_experts(&facts) && counts_experts(other)) check_experts(holder, facts, file, *other);
        }
    }
}

}  // namespace moeshard::shard
