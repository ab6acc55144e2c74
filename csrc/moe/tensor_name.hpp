// What the name of a tensor alone says about experts.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "moeshard/moe_layout.hpp"

namespace moeshard {

inline bool starts_with(std::string_view text, std::string_view prefix) {
    return text.substr(0, prefix.size()) == prefix;
}

inline bool ends_with(std::string_view text, std::string_view suffix) {
    return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

// "blk.3.ffn_up_exps.weight": layer 3, stem "ffn_up_exps", suffix "weight".
struct BlockName {
    uint32_t layer = 0;
    std::string_view stem;
    std::string_view suffix;

    // False for tensors that belong to no block.
    bool parse(std::string_view name);
};

struct ExpertAxis {
    Role role;
    int axis;  // which of ne[] counts the layer's experts
};

// Nothing where no axis counts single experts: trunk, chunk experts, tables of expert ids, and what is not known.
std::optional<ExpertAxis> expert_axis(const BlockName& name);

}  // namespace moeshard
