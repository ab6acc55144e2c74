#include "shard/holder.hpp"

#include <algorithm>

#include "ggml.h"
#include "gguf/checked.hpp"
#include "shard/facts.hpp"

namespace moeshard::shard {

namespace {

// How many experts share one index on the axis of experts.
uint32_t experts_per_slice(const MoeLayout& layout, const ExpertTensor& facts) {
    return facts.role == Role::kChunkSlab ? layout.experts_per_chunk : 1;
}

// One slice, and the file that it is taken from.
struct Slice {
    const Holder* holder;
    const ExpertTensor* facts;
    uint64_t number;  // in that file
};

Slice find_slice(const std::vector<Holder>& holders, const std::string& name, uint32_t layer, uint64_t slice,
                 uint32_t step) {
    for (const Holder& holder : holders) {
        const ExpertTensor* facts = holder.find(name);
        if (facts == nullptr || experts_per_slice(holder.layout(), *facts) != step) continue;
        if (!holder.holds(layer, static_cast<uint32_t>(slice * step))) continue;
        uint64_t number = 0;
        for (uint64_t i = 0; i < slice; ++i) number += holder.holds(layer, static_cast<uint32_t>(i * step));
        if (number >= facts->count) {
            throw Error(holder.map().path() + ": tensor '" + gguf::printable(name) +
                        "' holds fewer experts than the file says; it is damaged, write it again");
        }
        return {&holder, facts, number};
    }
    throw Error("tensor '" + gguf::printable(name) + "': expert " + std::to_string(slice) + " is in none of the files");
}

NewTensor gather_table(const Holder& holder, const ExpertTensor& facts, const uint8_t* row, uint32_t n_used) {
    const gguf::Tensor& tensor = holder.map().tensors()[facts.tensor];
    if (tensor.type != GGML_TYPE_I32) {
        throw Error(holder.map().path() + ": tensor '" + gguf::printable(tensor.name) + "' holds expert ids as " +
                    tensor.type_name() + ", only i32 is known; update moeshard");
    }
    NewTensor out = copy_tensor(holder.map(), tensor);
    // What a model says about a table that was not taken from another one is not about its own.
    const gguf::Directory& metadata = holder.map().metadata();
    const gguf::Entry* original = metadata.find(kKind) == nullptr ? nullptr : metadata.find(table_key(tensor.name));
    const uint64_t rows = tensor.nbytes / tensor.row_bytes;
    FileRange from = std::get<FileRange>(out.data.front());
    uint32_t n_in = static_cast<uint32_t>(tensor.ne[0]);
    if (original != nullptr) {
        const gguf::Part& part = holder.map().parts().front();
        const uint64_t at = original->range.end() - original->value.size;  // an entry ends with its value
        n_in = static_cast<uint32_t>(original->value.size / (rows * sizeof(int32_t)));
        if (n_in == 0 || original->type != gguf::ValueType::kInt32 || original->count != rows * n_in) {
            throw Error(holder.map().path() + ": '" + gguf::printable(original->key) +
                        "' is not the table of a shard; the file is damaged");
        }
        from = {part.mapping, {at, original->value.size}};
    }
    const uint32_t n_out = std::min(n_in, n_used);
    ExpertIdTable table{n_in, n_out, {row, row + holder.n_expert()}};
    const bool unchanged =
        n_out == n_in && std::all_of(table.keep.begin(), table.keep.end(), [](uint8_t kept) { return kept != 0; });
    out.ne[0] = n_out;
    out.nbytes = rows * n_out * sizeof(int32_t);
    out.data.clear();
    if (unchanged) {
        out.data.emplace_back(std::move(from));
    } else {
        out.data.emplace_back(NewTable{std::move(from), std::move(table)});
    }
    return out;
}

}  // namespace

Holder::Holder(const gguf::GGUFMap& map, std::vector<uint8_t> keep, uint32_t n_expert)
    : map_(&map), keep_(std::move(keep)), n_expert_(n_expert), layout_(moe_layout(map)) {}

const ExpertTensor* Holder::find(const std::string& tensor) const {
    const gguf::Tensor* found = map_->find(tensor);
    if (found == nullptr) return nullptr;
    const auto index = static_cast<size_t>(found - map_->tensors().data());
    // In file order, as the tensors are.
    const auto at = std::lower_bound(layout_.tensors.begin(), layout_.tensors.end(), index,
                                     [](const ExpertTensor& facts, size_t wanted) { return facts.tensor < wanted; });
    return at != layout_.tensors.end() && at->tensor == index ? &*at : nullptr;
}

NewTensor copy_tensor(const gguf::GGUFMap& map, const gguf::Tensor& tensor) {
    NewTensor out{tensor.name, tensor.type, tensor.n_dims, tensor.ne, tensor.nbytes, {}};
    out.data.emplace_back(FileRange{map.owner(tensor), {tensor.offset, tensor.nbytes}});
    return out;
}

NewTensor gather_tensor(const std::vector<Holder>& holders, const std::string& name, const uint8_t* row,
                        uint32_t n_used) {
    const auto first = std::find_if(holders.begin(), holders.end(),
                                    [&](const Holder& holder) { return holder.find(name) != nullptr; });
    if (first == holders.end()) throw Error("tensor '" + gguf::printable(name) + "' is in none of the files");
    const ExpertTensor& facts = *first->find(name);
    if (facts.role == Role::kExpertIds) return gather_table(*first, facts, row, n_used);

    const gguf::Tensor& like = first->map().tensors()[facts.tensor];
    NewTensor out{name, like.type, like.n_dims, like.ne, 0, {}};
    const uint32_t step = experts_per_slice(first->layout(), facts);
    uint64_t count = 0;
    for (uint64_t i = 0; i * step < first->n_expert(); ++i) {
        if (row[i * step] == 0) continue;
        const Slice slice = find_slice(holders, name, facts.layer, i, step);
        const gguf::Tensor& tensor = slice.holder->map().tensors()[slice.facts->tensor];
        if (tensor.type != like.type || slice.facts->slice_bytes != facts.slice_bytes) {
            throw Error(slice.holder->map().path() + ": tensor '" + gguf::printable(name) + "' " + tensor.shape() +
                        " (" + tensor.type_name() + ") is not that of " + first->map().path() +
                        "; these are shards of different models");
        }
        const gguf::ByteRange range{tensor.offset + slice.number * facts.slice_bytes, facts.slice_bytes};
        out.data.emplace_back(FileRange{slice.holder->map().owner(tensor), range});
        ++count;
    }
    out.ne[static_cast<size_t>(facts.axis)] = count;
    out.nbytes = count * facts.slice_bytes;
    return out;
}

std::string table_key(const std::string& tensor) { return "moeshard.source.tensor." + tensor; }

}  // namespace moeshard::shard
