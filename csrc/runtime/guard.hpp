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

// Gives the engine's log and abort callbacks to guards, for good.
void install_callbacks();

// Lets exceptions pass through calls of the engine on this thread while it lives. Where the engine's callbacks were
// taken over (process.hpp), it also collects the error messages of this thread, and a GGML_ABORT on it throws
// EngineAbort instead of ending the process.
class Guard {
public:
    Guard();
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

    // `what` followed by what the engine said since this guard was made.
    Error error(const std::string& what) const;

private:
    std::string messages_;
    mutable bool told_ = false;  // whether they are in an Error
    Guard* outer_;
    const bool passed_;

    friend struct EngineLog;
};

}  // namespace moeshard
