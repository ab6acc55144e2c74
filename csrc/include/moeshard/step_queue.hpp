// Steps of batchers for a reader in another thread, who is never waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "moeshard/batcher.hpp"

namespace moeshard {

class StepQueue {
public:
    // Eight bytes are written to `wake_fd`, a pipe or an eventfd that does not block, when something comes into the
    // empty queue; -1: nowhere.
    explicit StepQueue(int wake_fd = -1) : wake_fd_(wake_fd) {}
    StepQueue(const StepQueue&) = delete;
    StepQueue& operator=(const StepQueue&) = delete;

    // Steps a batcher again and again, until a request is over, none is left, `n_steps` were made (0: any number),
    // `seconds` have passed, or another thread interrupts; returns the numbers of requests that are over.
    // Throws what Batcher::step throws.
    std::vector<int64_t> run(Batcher& batcher, int64_t n_steps, double seconds);
    // Ends run() after the step that it is in; one that has not begun, after its first.
    void interrupt() { interrupted_ = true; }
    // All that came since the last time, in the order of the steps.
    std::vector<Progress> take();

private:
    void put(std::vector<Progress> steps);

    const int wake_fd_;
    std::atomic<bool> interrupted_{false};
    std::mutex mutex_;
    std::vector<Progress> steps_;
};

}  // namespace moeshard
