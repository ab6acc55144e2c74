#include "moeshard/generation.hpp"

#include <utility>

#include "llama.h"
#include "moeshard/error.hpp"
#include "runtime/owner.hpp"
#include "runtime/text_output.hpp"

namespace moeshard {

struct Generation::Impl {
    Impl(std::shared_ptr<Context> on, std::vector<int32_t> first, const GenerationParams& wanted, int32_t sequence);

    std::optional<std::string> next();
    std::string step();

    std::shared_ptr<Context> context;
    std::vector<int32_t> prompt;
    GenerationParams params;
    int32_t seq;
    Sampler sampler;
    std::vector<int32_t> tokens;
    TextOutput text;
    StopReason reason = StopReason::kRunning;
    int64_t prompt_us = 0;
    int64_t generation_us = 0;
    Owner owner{"generation"};
};

Generation::Impl::Impl(std::shared_ptr<Context> on, std::vector<int32_t> first, const GenerationParams& wanted,
                       int32_t sequence)
    : context(std::move(on)),
      prompt(std::move(first)),
      params(wanted),
      seq(sequence),
      sampler(context->model(), wanted.sampling),
      text(wanted.stop) {
    if (context->model().is_diffusion()) {
        throw Error(context->model().path() +
                    ": a diffusion model does not write from left to right, which is how text is generated here");
    }
    if (prompt.empty()) throw Error("the prompt is empty: generation needs at least one token to start from");
    for (const int32_t token : prompt) sampler.accept(token);
}

// Computes the newest token (at first the prompt), draws the one after it and returns what can be handed out now.
std::string Generation::Impl::step() {
    const bool first = tokens.empty();
    if (params.max_tokens >= 0 && tokens.size() >= static_cast<size_t>(params.max_tokens)) {
        reason = StopReason::kLength;
        return text.finish();
    }
    if (!first && context->n_past(seq) >= context->n_ctx()) {
        reason = StopReason::kContext;
        return text.finish();
    }
    const int64_t start = llama_time_us();
    const int32_t* input = first ? prompt.data() : &tokens.back();
    int32_t token = 0;
    context->decode({{seq, input, first ? prompt.size() : 1, Outputs::kLast}},
                    [&](size_t, size_t, const float* logits) { token = sampler.sample(logits); });
    (first ? prompt_us : generation_us) += llama_time_us() - start;
    if (context->model().is_end_of_generation(token) && !params.ignore_end) {
        reason = StopReason::kEnd;
        return text.finish();
    }
    tokens.push_back(token);
    std::string out = text.add(context->model().piece(token));
    if (text.stopped()) reason = StopReason::kStop;
    return out;
}

std::optional<std::string> Generation::Impl::next() {
    while (reason == StopReason::kRunning) {
        std::string out = step();
        if (!out.empty()) return out;
    }
    return std::nullopt;
}

Generation::Generation(std::shared_ptr<Context> context, std::vector<int32_t> prompt, const GenerationParams& params,
                       int32_t seq)
    : impl_(std::make_unique<Impl>(std::move(context), std::move(prompt), params, seq)) {}

Generation::~Generation() = default;

std::optional<std::string> Generation::next() {
    const Owner::Use use(impl_->owner);
    return impl_->next();
}
StopReason Generation::stop_reason() const { return impl_->reason; }
const std::vector<int32_t>& Generation::prompt() const { return impl_->prompt; }
const std::vector<int32_t>& Generation::tokens() const { return impl_->tokens; }
double Generation::prompt_seconds() const { return static_cast<double>(impl_->prompt_us) * 1e-6; }
double Generation::generation_seconds() const { return static_cast<double>(impl_->generation_us) * 1e-6; }
Context& Generation::context() { return *impl_->context; }

}  // namespace moeshard
