// Who may use a thing: one thread at a time, in the process that made it.
#pragma once

#include <unistd.h>

#include <atomic>
#include <string>

#include "moeshard/error.hpp"

namespace moeshard {

class Owner {
public:
    // `what` stands for the thing in errors, e.g. "context".
    explicit Owner(std::string what) : what_(std::move(what)), process_(::getpid()) {}

    // Threads of the engine are not there in a forked process, and locks may be held by them for ever.
    bool is_own_process() const { return process_ == ::getpid(); }
    void check_process() const {
        if (is_own_process()) return;
        throw Error("this " + what_ +
                    " was made before the process was forked, and its threads stayed behind; load "
                    "the model in the new process");
    }

    // Held while a thread uses the thing. Throws Error where another one does.
    class Use {
    public:
        explicit Use(Owner& owner) : owner_(owner) {
            owner.check_process();
            if (owner.used_.exchange(true)) {
                throw Error("this " + owner.what_ +
                            " is in use already, by another thread or by what called this; give "
                            "each thread one of its own");
            }
        }
        ~Use() { owner_.used_ = false; }
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;

    private:
        Owner& owner_;
    };

private:
    const std::string what_;
    const pid_t process_;
    std::atomic<bool> used_{false};
};

}  // namespace moeshard
