// Turns what llama.cpp logs, and what it aborts on, into Errors.
#pragma once

#include <string>

#include "moeshard/error.hpp"

namespace moeshard {

// The engine aborted; what it was working on must not be touched any more.
class EngineAbort : public Error {
public:
    using Error::Error;
};

// Collects the engine's error messages of this thread while it lives. On this thread a GGML_ABORT throws EngineAbort
// instead of ending the process.
class Guard {
public:
    Guard();
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

    // `what` followed by what the engine said since this guard was made.
    Error error(const std::string& what) const;

private:
    std::string messages;
    mutable bool told = false;  // whether they are in an Error
    Guard* outer;

    friend struct EngineLog;
};

}  // namespace moeshard
