// Text generation: a sampler and the loop that streams pieces of text.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moeshard/context.hpp"

namespace moeshard {

struct SamplingParams {
    float temperature = 0.8f;     // 0 or less: greedy, the others are then ignored but for the penalty
    int32_t top_k = 40;           // 0 or less: off
    float top_p = 0.95f;          // 1: off
    float min_p = 0.05f;          // 0: off
    float repeat_penalty = 1.0f;  // 1: off
    int32_t repeat_last_n = 64;   // tokens that the penalty looks back on; -1: 64
    uint32_t seed = 0xFFFFFFFF;   // this value: a random one
};

class Sampler {
public:
    // Throws Error on a parameter out of range.
    Sampler(const Model& model, const SamplingParams& params);
    ~Sampler();
    Sampler(const Sampler&) = delete;
    Sampler& operator=(const Sampler&) = delete;

    // Draws from n_vocab logits, and counts the token for the penalty.
    int32_t sample(const float* logits);
    // Counts a token that was not drawn, e.g. of the prompt.
    void accept(int32_t token);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

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

// One answer, token by token. Uses sequence `seq` of the context alone, from what it already holds on.
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
