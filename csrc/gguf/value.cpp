// Typed access to metadata, and the text that messages are made of.
#include <cstring>

#include "ggml.h"
#include "gguf/checked.hpp"
#include "moeshard/gguf.hpp"

namespace moeshard::gguf {

namespace {

struct TypeInfo {
    const char* name;
    size_t size;
};

constexpr TypeInfo kTypes[] = {{"uint8", 1},  {"int8", 1},    {"uint16", 2}, {"int16", 2},  {"uint32", 4},
                               {"int32", 4},  {"float32", 4}, {"bool", 1},   {"string", 0}, {"array", 0},
                               {"uint64", 8}, {"int64", 8},   {"float64", 8}};

[[noreturn]] void wrong_type(const Entry& entry, const char* wanted) {
    throw Error("metadata key '" + printable(entry.key) + "' should be " + wanted + ", but is " +
                (entry.is_array ? "an array of " : "of type ") + name(entry.type));
}

template <typename T>
T load(const Entry& entry, uint64_t i) {
    T value;
    std::memcpy(&value, entry.value.data + i * sizeof(T), sizeof(T));
    return value;
}

// Element i as a signed number and, where it is too large for that, as an unsigned one.
struct Integer {
    bool negative;
    uint64_t bits;
};

Integer signed_integer(int64_t value) { return {value < 0, static_cast<uint64_t>(value)}; }

Integer integer_at(const Entry& entry, uint64_t i) {
    switch (entry.type) {
        case ValueType::kUint8:
            return {false, load<uint8_t>(entry, i)};
        case ValueType::kUint16:
            return {false, load<uint16_t>(entry, i)};
        case ValueType::kUint32:
            return {false, load<uint32_t>(entry, i)};
        case ValueType::kUint64:
            return {false, load<uint64_t>(entry, i)};
        case ValueType::kInt8:
            return signed_integer(load<int8_t>(entry, i));
        case ValueType::kInt16:
            return signed_integer(load<int16_t>(entry, i));
        case ValueType::kInt32:
            return signed_integer(load<int32_t>(entry, i));
        case ValueType::kInt64:
            return signed_integer(load<int64_t>(entry, i));
        case ValueType::kBool:
            return {false, load<uint8_t>(entry, i) != 0 ? 1u : 0u};
        default:
            wrong_type(entry, "an integer");
    }
}

uint64_t uint_at(const Entry& entry, uint64_t i) {
    const Integer value = integer_at(entry, i);
    if (value.negative) throw Error("metadata key '" + printable(entry.key) + "' is negative");
    return value.bits;
}

}  // namespace

const char* name(ValueType type) { return kTypes[static_cast<uint32_t>(type)].name; }
size_t size_of(ValueType type) { return kTypes[static_cast<uint32_t>(type)].size; }

uint64_t Entry::as_uint() const {
    if (is_array) wrong_type(*this, "an integer");
    return uint_at(*this, 0);
}

int64_t Entry::as_int() const {
    if (is_array) wrong_type(*this, "an integer");
    const Integer integer = integer_at(*this, 0);
    if (!integer.negative && integer.bits > static_cast<uint64_t>(INT64_MAX)) {
        throw Error("metadata key '" + printable(key) + "' is too large");
    }
    return static_cast<int64_t>(integer.bits);
}

double Entry::as_float() const {
    if (is_array) wrong_type(*this, "a number");
    if (type == ValueType::kFloat32) return static_cast<double>(load<float>(*this, 0));
    if (type == ValueType::kFloat64) return load<double>(*this, 0);
    wrong_type(*this, "a float");
}

bool Entry::as_bool() const {
    if (is_array || type != ValueType::kBool) wrong_type(*this, "a bool");
    return load<uint8_t>(*this, 0) != 0;
}

std::string_view Entry::as_string() const {
    if (is_array) wrong_type(*this, "a string");
    return as_strings().front();
}

std::vector<uint64_t> Entry::as_uints() const {
    std::vector<uint64_t> values;
    values.reserve(static_cast<size_t>(count));
    for (uint64_t i = 0; i < count; ++i) values.push_back(uint_at(*this, i));
    return values;
}

std::vector<std::string_view> Entry::as_strings() const {
    if (type != ValueType::kString) wrong_type(*this, "of type string");
    std::vector<std::string_view> strings;
    strings.reserve(static_cast<size_t>(count));
    // parse() has checked that the lengths fit.
    const uint8_t* at = value.data;
    for (uint64_t i = 0; i < count; ++i) {
        uint64_t length;
        std::memcpy(&length, at, sizeof(length));
        at += sizeof(length);
        strings.emplace_back(reinterpret_cast<const char*>(at), static_cast<size_t>(length));
        at += length;
    }
    return strings;
}

const char* Tensor::type_name() const { return ggml_type_name(static_cast<ggml_type>(type)); }

std::string Tensor::shape() const {
    std::string text = "[";
    for (uint32_t i = 0; i < n_dims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(ne[i]);
    return text + "]";
}

bool is_utf8(std::string_view text) {
    const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
    for (size_t i = 0; i < text.size();) {
        const uint8_t lead = byte(i);
        const size_t length = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : (lead & 0xf0) == 0xe0 ? 3 : 4;
        if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || length > text.size() - i) return false;
        for (size_t k = 1; k < length; ++k) {
            if ((byte(i + k) & 0xc0) != 0x80) return false;
        }
        // Overlong forms, surrogates, and what lies beyond U+10FFFF.
        if (lead == 0xe0 && byte(i + 1) < 0xa0) return false;
        if (lead == 0xed && byte(i + 1) >= 0xa0) return false;
        if (lead == 0xf0 && byte(i + 1) < 0x90) return false;
        if (lead == 0xf4 && byte(i + 1) >= 0x90) return false;
        i += length;
    }
    return true;
}

std::string printable(std::string_view text) {
    constexpr size_t kLongest = 80;
    constexpr char kDigits[] = "0123456789abcdef";
    std::string shown;
    for (const char c : text.substr(0, kLongest)) {
        const auto byte = static_cast<uint8_t>(c);
        if (byte >= 0x20 && byte < 0x7f) {
            shown += c;
        } else {
            shown += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
        }
    }
    return text.size() > kLongest ? shown + "..." : shown;
}

}  // namespace moeshard::gguf
