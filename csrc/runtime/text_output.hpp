// Pieces of text as they can be handed out: whole characters, and nothing that may yet become a stop text.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace moeshard {

class TextOutput {
public:
    // Empty stop texts are ignored.
    explicit TextOutput(std::vector<std::string> stop);

    // Adds what a token reads and returns what can be handed out; it ends before the first stop text.
    std::string add(const std::string& piece);
    // Returns the rest, which no more tokens follow.
    std::string finish();

    bool stopped() const { return stopped_; }  // a stop text came
    size_t held_back() const { return pending_.size(); }

private:
    std::vector<std::string> stop_;
    std::string pending_;
    bool stopped_ = false;
};

}  // namespace moeshard
