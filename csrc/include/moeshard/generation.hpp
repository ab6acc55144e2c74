// Text generation: the loop that streams pieces of text.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moeshard/context.hpp"
#include "moeshard/sampler.hpp"

namespace moeshard {

struct GenerationParams {
    SamplingParams sampling;
    int32_t max_tokens = 128;       // negative: until the sequence is full
    std::vector<std::string> stop;  // text that ends the generation and is not part of it
    bool ignore_end = false;        // go on after the model's end of generation
};

enum class StopReason {
    kRunning,
    kEnd,      // the model ended its answer
    kStop,     // a stop text came
    kLength,   // max_tokens were generated
    kContext,  // the sequence is full
    // As 0.1.0 called them.
    running = kRunning,
    end = kEnd,
    stop = kStop,
    length = kLength,
    context = kContext,
};

// One answer, token by token, for one thread at a time. Uses sequence `seq` of the context alone, from what it already
// holds on.
class Generation {
public:
    // Throws Error where the prompt is empty or does not fit.
    Generation(std::shared_ptr<Context> context, std::vector<int32_t> prompt, const GenerationParams& params,
               int32_t seq = 0);
    ~Generation();
    Generation(const Generation&) = delete;
    Generation& operator=(const Generation&) = delete;

    // The next piece of text (valid UTF-8 as long as the model writes such; never empty), or nothing at the end.
    std::optional<std::string> next();

    StopReason stop_reason() const;
    const std::vector<int32_t>& prompt() const;
    const std::vector<int32_t>& tokens() const;  // generated so far
    double prompt_seconds() const;
    double generation_seconds() const;
    Context& context();

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace moeshard
