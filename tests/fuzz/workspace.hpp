// Files for what can only be opened by name. None outlives the call that opens it: what is mapped needs no name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moeshard/gguf.hpp"

namespace fuzz {

class Workspace {
public:
    Workspace();
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // A model of one or two parts; the first becomes `size` bytes long, if that is more than it has.
    moeshard::gguf::GGUFMap open(const std::vector<std::string>& parts, uint64_t size);

    // Safe in a signal handler.
    void remove() const;

private:
    std::string folder_;
    std::vector<std::string> names_;  // one file, or two parts
};

Workspace& workspace();

}  // namespace fuzz
