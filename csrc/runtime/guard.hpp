// Turns what llama.cpp logs, and what it aborts on, into Errors.
#pragma once

#include <exception>
#include <new>
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

    // Calls into the engine. What it throws, which is any std::exception, becomes an Error that says `what` failed.
    template <typename Call>
    auto run(const std::string& what, Call call) const {
        try {
            return call();
        } catch (const Error&) {
            throw;
        } catch (const std::bad_alloc&) {
            throw error(what + ": out of memory");
        } catch (const std::exception& thrown) {
            throw error(what + ": llama.cpp failed with '" + thrown.what() + "'");
        }
    }

private:
    std::string messages_;
    mutable bool told_ = false;  // whether they are in an Error
    Guard* outer_;
    const bool passed_;

    friend struct EngineLog;
};

}  // namespace moeshard
