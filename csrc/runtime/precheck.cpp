#include "runtime/precheck.hpp"

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
    if (!std::isfinite(value)) {
        wanted = "a finite number";
    } else if (contains(entry.key, "epsilon") && value < 0) {
        wanted = "zero or more";
    } else if (contains(entry.key, "rope.freq_base") && value <= 0) {
        wanted = "more than zero";
    }
    if (wanted) {
        throw Error(path + ": " + entry.key + " is " + std::to_string(value) + ", it must be " + wanted +
                    "; the file is damaged");
    }
}

}  // namespace

void check_file(const std::string& path) {
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
}

}  // namespace moeshard
