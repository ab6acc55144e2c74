#include "runtime/precheck.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string_view>

#include "gguf/checked.hpp"
#include "moe/expert_counts.hpp"
#include "moeshard/error.hpp"
#include "moeshard/gguf.hpp"
#include "moeshard/moe_layout.hpp"

namespace moeshard {

namespace {

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

// Of the numbers that the engine computes with, those on which it aborts. -inf and NaN are sound values of others:
// llama.cpp's own saver writes -inf where something has no bound.
void check_number(const std::string& path, const gguf::Entry& entry) {
    const double value = entry.as_float();
    const char* wanted = nullptr;
    if (contains(entry.key, "epsilon") && !(std::isfinite(value) && value >= 0)) {
        wanted = "a finite number that is not negative";
    } else if (contains(entry.key, "rope.freq_base") && !(std::isfinite(value) && value > 0)) {
        wanted = "a finite number above zero";
    }
    if (wanted) {
        throw Error(path + ": " + entry.key + " is " + std::to_string(value) + ", it must be " + wanted +
                    "; the file is damaged");
    }
}

// "" where the engine will say what is wrong with it.
std::string architecture(const gguf::GGUFMap& file) {
    const gguf::Entry* entry = file.metadata().find("general.architecture");
    const bool is_text = entry != nullptr && entry->type == gguf::ValueType::kString && !entry->is_array;
    std::string name(is_text ? entry->as_string() : "");
    if (name != gguf::printable(name)) {
        throw Error(file.path() + ": general.architecture is '" + gguf::printable(name) + "', which is no name");
    }
    return name;
}

// llama.cpp builds the experts of every layer with the first layer's number, but sums those of the layer's own: where
// they differ it reads past what was computed. Only Nemotron-H passes each layer's number on.
void check_used(const gguf::GGUFMap& file, const std::string& arch) {
    const gguf::Entry* entry = file.metadata().find(arch + ".expert_used_count");
    if (entry == nullptr || !entry->is_array || arch.rfind("nemotron_h", 0) == 0) return;
    const MoeLayout layout = moe_layout(file);
    for (const uint32_t layer : layout.moe_layers) {
        const uint32_t used = layout.n_expert_used[layer], first = layout.n_expert_used[0];
        if (used == first) continue;
        throw Error(file.path() + ": " + entry->key + " is " + std::to_string(used) + " in layer " +
                    std::to_string(layer) + " and " + std::to_string(first) +
                    " in layer 0: llama.cpp computes layers " +
                    "with different numbers of experts per token wrongly in models of architecture '" + arch +
                    "'; write the file with one number for all layers");
    }
}

}  // namespace

CheckedFile check_file(const std::string& path) {
    std::error_code failed;
    const auto status = std::filesystem::status(path, failed);
    if (!std::filesystem::exists(status)) throw Error(path + ": no such file");
    if (std::filesystem::is_directory(status)) throw Error(path + ": is a directory, not a GGUF file");
    const gguf::GGUFMap file(path);
    // llama.cpp would abort on some wrong counts.
    if (file.metadata().find(kCountsKey) != nullptr) moe_layout(file);
    const std::string arch = architecture(file);
    check_used(file, arch);
    const std::string own = arch + ".";
    for (const gguf::Entry& entry : file.metadata().entries) {
        const bool is_float = entry.type == gguf::ValueType::kFloat32 || entry.type == gguf::ValueType::kFloat64;
        // What other programs noted is theirs.
        const bool is_own = entry.key.compare(0, own.size(), own) == 0;
        if (is_float && is_own && !entry.is_array) check_number(path, entry);
    }
    const bool can_be_mapped = std::all_of(file.parts().begin(), file.parts().end(),
                                           [](const gguf::Part& part) { return part.mapping->is_shareable(); });
    return {file.path(), can_be_mapped};
}

}  // namespace moeshard
