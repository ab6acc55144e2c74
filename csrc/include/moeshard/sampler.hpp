// Drawing tokens from logits.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moeshard/model.hpp"

namespace moeshard {

struct SamplingParams {
    float temperature = 0.8f;     // 0 or less: greedy; top_k, top_p and min_p are then ignored
    int32_t top_k = 40;           // 0 or less: off
    float top_p = 0.95f;          // 1: off
    float min_p = 0.05f;          // 0: off
    float repeat_penalty = 1.0f;  // 1: off; counts the prompt too
    int32_t repeat_last_n = 64;   // tokens that repeat_penalty looks back on; -1: 64
    // Subtracted per occurrence, and once, of a token in what was generated so far (as OpenAI defines them). 0: off.
    float frequency_penalty = 0.0f;
    float presence_penalty = 0.0f;
    std::vector<std::pair<int32_t, float>> logit_bias;  // added to the scores of tokens; -INFINITY forbids one
    std::string grammar;                                // GBNF whose rule `root` the text must follow; empty: any text
    uint32_t seed = 0xFFFFFFFF;                         // this value: a random one
};

class Sampler {
public:
    // Throws Error on a parameter out of range, or a grammar that cannot be read.
    Sampler(const Model& model, const SamplingParams& params);
    ~Sampler();
    Sampler(const Sampler&) = delete;
    Sampler& operator=(const Sampler&) = delete;

    int32_t n_vocab() const;
    // Draws from n_vocab logits, and counts the token for the penalties.
    int32_t sample(const float* logits);
    // Counts a token that was not drawn, but belongs to the prompt.
    void accept(int32_t token);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace moeshard
