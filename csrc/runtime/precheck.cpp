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

}  // namespace

CheckedFile check_file(const std::string& path) {
    std::error_code failed;
    const auto status = std::filesystem::status(path, failed);
    if (!std::filesystem::exists(status)) throw Error(path + ": no such file");
    if (std::filesystem::is_directory(status)) throw Error(path + ": is a directory, not a GGUF file");
    const gguf::GGUFMap file(path);
    // llama.cpp would abort on some wrong counts.
    if (file.metadata().find(kCountsKey) != nullptr) moe_layout(file);
    const std::string own = architecture(file) + ".";
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
