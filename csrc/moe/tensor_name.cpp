#include "moe/tensor_name.hpp"

#include <string>

namespace moeshard {

bool BlockName::parse(std::string_view name) {
    if (!starts_with(name, "blk.")) return false;
    name.remove_prefix(4);
    const size_t digits = name.find_first_not_of("0123456789");
    if (digits == 0 || digits > 6 || digits == name.npos || name[digits] != '.') return false;
    layer = static_cast<uint32_t>(std::stoul(std::string(name.substr(0, digits))));
    name.remove_prefix(digits + 1);
    const size_t dot = name.rfind('.');
    stem = name.substr(0, dot);
    suffix = dot == name.npos ? std::string_view() : name.substr(dot + 1);
    return true;
}

// llama.cpp always makes experts the outermost axis, so which one it is follows from what the tensor is; the number of
// dimensions in the file does not tell, because writers drop trailing dimensions of 1.
std::optional<ExpertAxis> expert_axis(const BlockName& name) {
    if (starts_with(name.stem, "ffn_norm")) return std::nullopt;  // of what all experts of a layer read
    if (starts_with(name.stem, "exp_probs_b")) return ExpertAxis{Role::kRouterValue, 0};
    if (name.stem == "ffn_gate_inp") {
        if (name.suffix == "weight") return ExpertAxis{Role::kRouter, 1};
        if (name.suffix == "bias") return ExpertAxis{Role::kRouterValue, 0};
    } else if (ends_with(name.stem, "_exps")) {
        if (name.suffix == "weight") return ExpertAxis{Role::kSlab, 2};
        if (name.suffix == "bias") return ExpertAxis{Role::kPerExpert, 1};
        if (name.suffix == "scale" || name.suffix == "input_scale") return ExpertAxis{Role::kPerExpert, 0};
    }
    return std::nullopt;
}

}  // namespace moeshard
