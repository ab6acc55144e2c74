#include "runtime/precheck.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string_view>

#include "moe/expert_counts.hpp"
#include "moeshard/error.hpp"
#include "moeshard/gguf.hpp"
#include "moeshard/moe_layout.hpp"

namespace moeshard {

namespace {

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

void check_number(const std::string& path, const gguf::Entry& entry) {
    const double value = entry.as_float();
    const char* wanted = nullptr;
    // On these the engine aborts. Others may hold what they like: its own saver writes -inf where something has no
    // bound.
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

}  // namespace

CheckedFile check_file(const std::string& path) {
    std::error_code failed;
    const auto status = std::filesystem::status(path, failed);
    if (!std::filesystem::exists(status)) throw Error(path + ": no such file");
    if (std::filesystem::is_directory(status)) throw Error(path + ": is a directory, not a GGUF file");
    const gguf::GGUFMap file(path);
    // llama.cpp would abort on some wrong counts.
    if (file.metadata().find(kCountsKey) != nullptr) moe_layout(file);
    for (const gguf::Entry& entry : file.metadata().entries) {
        const bool is_float = entry.type == gguf::ValueType::kFloat32 || entry.type == gguf::ValueType::kFloat64;
        if (is_float && !entry.is_array) check_number(path, entry);
    }
    const bool is_shared = std::all_of(file.parts().begin(), file.parts().end(),
                                       [](const gguf::Part& part) { return part.mapping->is_shared(); });
    return {file.path(), is_shared};
}

}  // namespace moeshard
