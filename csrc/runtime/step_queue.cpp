#include "moeshard/step_queue.hpp"

#include <unistd.h>

#include <chrono>
#include <iterator>
#include <utility>

namespace moeshard {

void StepQueue::put(std::vector<Progress> steps) {
    bool was_empty;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        was_empty = steps_.empty();
        steps_.insert(steps_.end(), std::make_move_iterator(steps.begin()), std::make_move_iterator(steps.end()));
    }
    if (!was_empty || wake_fd_ < 0) return;
    const uint64_t one = 1;  // as an eventfd wants it
    // Where nothing fits any more, the reader is going to be woken by what is there.
    [[maybe_unused]] const ssize_t n = ::write(wake_fd_, &one, sizeof(one));
}

std::vector<Progress> StepQueue::take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(steps_, {});
}

std::vector<int64_t> StepQueue::run(Batcher& batcher, int64_t n_steps, double seconds) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    std::vector<int64_t> over;
    for (int64_t n = 0; n_steps == 0 || n < n_steps;) {
        std::vector<Progress> steps = batcher.step();
        ++n;
        const bool is_done = steps.empty();
        for (const Progress& progress : steps) {
            if (progress.over()) over.push_back(progress.id);
        }
        if (!is_done) put(std::move(steps));
        if (interrupted_.exchange(false) || is_done || !over.empty() || Clock::now() >= end) break;
    }
    return over;
}

}  // namespace moeshard
