// The encoding of metadata entries.
#include <limits>

#include "gguf/checked.hpp"
#include "shard/assemble.hpp"

namespace moeshard::shard {

namespace {

std::string text(std::string_view value) { return number<uint64_t>(value.size()) + std::string(value); }

// Of the types that a count can have.
uint64_t largest(gguf::ValueType type) {
    if (type == gguf::ValueType::kBool) return 1;
    const bool is_signed = type == gguf::ValueType::kInt8 || type == gguf::ValueType::kInt16 ||
                           type == gguf::ValueType::kInt32 || type == gguf::ValueType::kInt64;
    return std::numeric_limits<uint64_t>::max() >> (64 - 8 * gguf::size_of(type) + (is_signed ? 1 : 0));
}

std::string type_number(gguf::ValueType type) { return number(static_cast<uint32_t>(type)); }

}  // namespace

std::string scalar_entry(std::string_view key, gguf::ValueType type, std::string_view value) {
    return text(key) + type_number(type) + std::string(value);
}

std::string array_entry_head(std::string_view key, gguf::ValueType type, uint64_t count) {
    return text(key) + type_number(gguf::ValueType::kArray) + type_number(type) + number(count);
}

std::string string_entry(std::string_view key, std::string_view value) {
    return scalar_entry(key, gguf::ValueType::kString, text(value));
}

std::string strings_entry(std::string_view key, const std::vector<std::string>& texts) {
    std::string entry = array_entry_head(key, gguf::ValueType::kString, texts.size());
    for (const std::string& value : texts) entry += text(value);
    return entry;
}

std::string uints_entry(std::string_view key, const std::vector<uint32_t>& values) {
    std::string entry = array_entry_head(key, gguf::ValueType::kUint32, values.size());
    for (const uint32_t value : values) entry += number(value);
    return entry;
}

std::string replaced_entry(const gguf::Entry& like, const std::vector<uint64_t>& values) {
    const size_t width = gguf::size_of(like.type);
    const uint64_t most = largest(like.type);
    std::string bytes;
    for (uint64_t i = 0; i < like.count; ++i) {
        const uint64_t value = values.size() == 1 ? values.front() : values.at(i);
        if (value > most) {
            throw Error("metadata key '" + gguf::printable(like.key) + "' is of type " + gguf::name(like.type) +
                        ", which cannot hold " + std::to_string(value));
        }
        bytes += number(value).substr(0, width);
    }
    return like.is_array ? array_entry_head(like.key, like.type, like.count) + bytes
                         : scalar_entry(like.key, like.type, bytes);
}

}  // namespace moeshard::shard
