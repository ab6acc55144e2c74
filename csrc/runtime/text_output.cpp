#include "runtime/text_output.hpp"

#include <algorithm>
#include <utility>

namespace moeshard {

namespace {

// Bytes of a character that the end of `text` cuts, 0 where it is whole (or no UTF-8 at all).
size_t cut_character(const std::string& text) {
    for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
        const auto byte = static_cast<unsigned char>(text[text.size() - back]);
        if ((byte & 0xC0) == 0x80) continue;  // continuation
        const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
        return length > back ? back : 0;
    }
    return 0;
}

// Length of the longest end of `text` that begins `stop`, without being all of it.
size_t started(const std::string& text, const std::string& stop) {
    for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
        if (text.compare(text.size() - n, n, stop, 0, n) == 0) return n;
    }
    return 0;
}

}  // namespace

TextOutput::TextOutput(std::vector<std::string> stop) : stop_(std::move(stop)) {
    stop_.erase(std::remove(stop_.begin(), stop_.end(), ""), stop_.end());
}

std::string TextOutput::add(const std::string& piece) {
    pending_ += piece;
    size_t end = std::string::npos;
    size_t held = cut_character(pending_);
    for (const std::string& stop : stop_) {
        end = std::min(end, pending_.find(stop));
        held = std::max(held, started(pending_, stop));
    }
    if (end != std::string::npos) {
        stopped_ = true;
        pending_.resize(end);
        held = 0;
    }
    std::string text = pending_.substr(0, pending_.size() - held);
    pending_.erase(0, text.size());
    return text;
}

std::string TextOutput::finish() { return std::exchange(pending_, {}); }

}  // namespace moeshard
