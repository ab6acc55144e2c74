// The text is "27:080000… 29:0b0000…": the number of each entry among all of the model's, and its bytes in hex.
#include "shard/split_entries.hpp"

#include <algorithm>
#include <charconv>

#include "shard/facts.hpp"

namespace moeshard {

namespace {

constexpr std::string_view kSplit = "split.";
constexpr std::string_view kDigits = "0123456789abcdef";

}  // namespace

std::string split_entries(const gguf::GGUFMap& model) {
    std::string text;
    if (model.parts().size() > 1) return text;
    const gguf::Part& part = model.parts().front();
    const std::vector<gguf::Entry>& entries = part.directory.entries;
    for (size_t i = 0; i < entries.size(); ++i) {
        if (!starts_with(entries[i].key, kSplit)) continue;
        text += (text.empty() ? "" : " ") + std::to_string(i) + ":";
        for (uint64_t at = entries[i].range.offset; at < entries[i].range.end(); ++at) {
            const uint8_t byte = part.header->at(static_cast<size_t>(at));
            text += {kDigits[byte >> 4], kDigits[byte & 15]};
        }
    }
    return text;
}

namespace shard {

namespace {

// False where `text` is not the number of an entry and its bytes.
bool read_item(std::string_view text, size_t& index, std::string& bytes) {
    const size_t colon = text.find(':');
    if (colon == text.npos || (text.size() - colon) % 2 == 0) return false;
    const char* end = text.data() + colon;
    const auto number = std::from_chars(text.data(), end, index);
    if (number.ec != std::errc() || number.ptr != end) return false;
    for (size_t i = colon + 1; i < text.size(); i += 2) {
        const size_t high = kDigits.find(text[i]);
        const size_t low = kDigits.find(text[i + 1]);
        if (high == kDigits.npos || low == kDigits.npos) return false;
        bytes += static_cast<char>(high * 16 + low);
    }
    return true;
}

// Whether the bytes are one entry, and of those that this is about.
bool is_split_entry(const std::string& bytes) {
    const std::string header = "GGUF" + number<uint32_t>(3) + number<uint64_t>(0) + number<uint64_t>(1) + bytes;
    try {
        const gguf::Bytes all{reinterpret_cast<const uint8_t*>(header.data()), header.size()};
        const gguf::Directory directory = gguf::parse(all, "");
        const gguf::Entry& entry = directory.entries.front();
        return starts_with(entry.key, kSplit) && entry.range.size == bytes.size();
    } catch (const Error&) {
        return false;
    }
}

}  // namespace

void insert_split_entries(std::string_view text, const std::string& name, std::vector<std::vector<Piece>>& entries) {
    while (!text.empty()) {
        const size_t space = std::min(text.find(' '), text.size());
        size_t index = 0;
        std::string bytes;
        if (!read_item(text.substr(0, space), index, bytes) || index > entries.size() || !is_split_entry(bytes)) {
            throw Error(name + ": " + std::string(kPrefix) + kSplitEntriesNote +
                        " holds no entries of metadata; the file is damaged, write it again");
        }
        std::vector<Piece> entry;
        entry.emplace_back(std::move(bytes));
        entries.insert(entries.begin() + static_cast<std::ptrdiff_t>(index), std::move(entry));
        text.remove_prefix(std::min(space + 1, text.size()));
    }
}

}  // namespace shard

}  // namespace moeshard
