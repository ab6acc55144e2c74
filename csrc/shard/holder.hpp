// Takes expert tensors apart and puts them together: from one file that holds all experts, or from several that hold
// some each.
#pragma once

#include <vector>

#include "moeshard/moe_layout.hpp"
#include "moeshard/shard.hpp"
#include "shard/assemble.hpp"

namespace moeshard::shard {

// A file and the experts in it.
class Holder {
public:
    // `keep`: (n_layer, n_expert) of the whole model.
    Holder(const gguf::GGUFMap& map, std::vector<uint8_t> keep, uint32_t n_expert);

    const gguf::GGUFMap& map() const { return *map_; }
    const MoeLayout& layout() const { return layout_; }
    bool holds(uint32_t layer, uint32_t expert) const { return row(layer)[expert] != 0; }
    const uint8_t* row(uint32_t layer) const { return keep_.data() + static_cast<size_t>(layer) * n_expert_; }
    // Nothing where the tensor is not in the file, or does not depend on experts.
    const ExpertTensor* find(const std::string& tensor) const;
    uint32_t n_expert() const { return n_expert_; }  // of the whole model

private:
    const gguf::GGUFMap* map_;
    std::vector<uint8_t> keep_;
    uint32_t n_expert_;
    MoeLayout layout_;
};

// A tensor as it is.
NewTensor copy_tensor(const gguf::GGUFMap& map, const gguf::Tensor& tensor);

// An expert tensor with the experts of `row`, (n_expert,), each from the first of `holders` that has it. `n_used` is
// the experts per token where the tensor is a table of expert ids. Throws Error where an expert is in none of them.
NewTensor gather_tensor(const std::vector<Holder>& holders, const std::string& name, const uint8_t* row,
                        uint32_t n_used);

// Under which key the ids of a table before it was converted are written down: what is lost by that cannot be computed.
std::string table_key(const std::string& tensor);

}  // namespace moeshard::shard
