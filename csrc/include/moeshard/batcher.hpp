// Continuous batching: many requests computed together, a token of each per step.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moeshard/generation.hpp"

namespace moeshard {

struct BatcherParams {
    int32_t n_slots = 4;     // requests computed at once
    int32_t n_ctx = 0;       // tokens that each can hold; 0: what the model was trained on
    int32_t n_batch = 2048;  // tokens handed to the engine at once
    int32_t n_ubatch = 512;  // tokens computed at once
    int32_t n_threads = 0;   // 0: as many as the processors this process may use
    // Tokens of prompts computed per step, over all requests: what the others wait for between two of their tokens.
    int32_t n_prefill = 512;
    bool meter = false;  // measure what requests under a keep miss: see Context::missed
};

struct Request {
    std::vector<int32_t> prompt;
    GenerationParams params;           // max_tokens 0: only the prompt is computed
    std::shared_ptr<const Keep> keep;  // null: all experts
    // What the engine remembers of a prompt serves later requests that begin alike, of the same scope and keep only.
    std::string scope;
    int32_t n_logprobs = -1;       // how many likeliest tokens are told with each token; -1: no log-probabilities
    bool prompt_logprobs = false;  // of the prompt's tokens too; nothing remembered is then used
};

struct TokenLogprob {
    int32_t token = 0;
    std::string bytes;
    float logprob = 0.0f;  // natural logarithm, of the whole vocabulary before any sampling parameter
    std::vector<std::pair<int32_t, float>> top;  // the n_logprobs likeliest tokens, best first
};

// What a step did for one request.
struct Progress {
    int64_t id = 0;
    std::string text;                    // can be handed out now
    std::vector<TokenLogprob> logprobs;  // of the prompt's tokens but the first, or of generated ones
    int32_t n_prompt = 0;                // tokens of the prompt
    int32_t n_prompt_done = 0;           // of them, computed or remembered
    int32_t n_cached = 0;                // of them, remembered
    int32_t n_generated = 0;             // so far
    int32_t token = -1;                  // that was generated in this step
    std::vector<float> missed;           // of each token that was computed in this step: see Context::missed
    StopReason reason = StopReason::kRunning;
    std::string error;  // why this request failed; it is over then
    bool over() const { return reason != StopReason::kRunning || !error.empty(); }
};

// For one thread at a time, except abort(): another one gets an Error.
class Batcher {
public:
    Batcher(std::shared_ptr<const Model> model, const BatcherParams& params = {});
    ~Batcher();
    Batcher(const Batcher&) = delete;
    Batcher& operator=(const Batcher&) = delete;

    const BatcherParams& params() const;  // n_ctx is that of a slot
    int32_t n_free() const;               // slots without a request
    int32_t n_held() const;               // tokens that all slots remember

    // Takes a slot, the one that remembers most of the prompt; returns the request's number. Throws Error where no slot
    // is free, the prompt is empty or does not fit, or a parameter is wrong.
    int64_t submit(Request request);
    // Ends a request; what was computed is remembered. Unknown numbers are those of requests that are over.
    void cancel(int64_t id);

    // Computes a request under another keep from its next token on, in the batcher `to`: this one, or one of a model
    // with the same vocabulary. What was computed of prompt and answer is computed again there, as part of the prompts;
    // sampler, grammar, stop texts and counts go on where they are. Returns the request's number there. Throws Error,
    // and changes nothing, where it is unknown, `to` has no free slot or too small ones, or the keep does not fit.
    int64_t move(int64_t id, Batcher& to, std::shared_ptr<const Keep> keep);

    // Computes the next token of every request, and a part of the prompts that are not done. Empty where there is
    // nothing to do. Throws Error only where no request can be computed any more.
    std::vector<Progress> step();

    // Makes a step that another thread is in end; its requests fail.
    void abort();
    // Asked every few milliseconds while computing, on the computing thread; true aborts.
    void set_interrupt(std::function<bool()> check);
    // Forgets what slots without a request remember.
    void forget();

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace moeshard
