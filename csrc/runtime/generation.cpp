#include "moeshard/generation.hpp"

#include <algorithm>
#include <utility>

#include "llama.h"
#include "moeshard/error.hpp"

namespace moeshard {

namespace {

// Bytes of a character that the end of `text` cuts, 0 where it is whole (or no UTF-8 at all).
size_t cut_character(const std::string& text) {
    for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
        const auto byte = static_cast<unsigned char>(text[text.size() - back]);
        if ((byte & 0xC0) == 0x80) continue;  // continuation
        const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
        return length > back ? back : 0;
    }
    return 0;
}

// Length of the longest end of `text` that begins `stop`, without being all of it.
size_t started(const std::string& text, const std::string& stop) {
    for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
        if (text.compare(text.size() - n, n, stop, 0, n) == 0) return n;
    }
    return 0;
}

}  // namespace

struct Generation::Impl {
    Impl(std::shared_ptr<Context> on, std::vector<int32_t> first, const GenerationParams& wanted, int32_t sequence);

    std::optional<std::string> next();
    void step();
    std::string release();

    std::shared_ptr<Context> context;
    std::vector<int32_t> prompt;
    GenerationParams params;
    int32_t seq;
    Sampler sampler;
    std::vector<int32_t> tokens;
    std::string pending;  // not handed out: a cut character, or what may become a stop text
    StopReason reason = StopReason::kRunning;
    int64_t prompt_us = 0;
    int64_t generation_us = 0;
};

Generation::Impl::Impl(std::shared_ptr<Context> on, std::vector<int32_t> first, const GenerationParams& wanted,
                       int32_t sequence)
    : context(std::move(on)),
      prompt(std::move(first)),
      params(wanted),
      seq(sequence),
      sampler(context->model(), wanted.sampling) {
    if (context->model().is_diffusion()) {
        throw Error(context->model().path() +
                    ": a diffusion model does not write from left to right, which is how text is generated here");
    }
    if (prompt.empty()) throw Error("the prompt is empty: generation needs at least one token to start from");
    params.stop.erase(std::remove(params.stop.begin(), params.stop.end(), ""), params.stop.end());
    for (const int32_t token : prompt) sampler.accept(token);
}

// Computes the newest token (at first the prompt) and draws the one after it.
void Generation::Impl::step() {
    const bool first = tokens.empty();
    if (params.max_tokens >= 0 && tokens.size() >= static_cast<size_t>(params.max_tokens)) {
        reason = StopReason::kLength;
        return;
    }
    if (!first && context->n_past(seq) >= context->n_ctx()) {
        reason = StopReason::kContext;
        return;
    }
    const int64_t start = llama_time_us();
    const int32_t* input = first ? prompt.data() : &tokens.back();
    int32_t token = 0;
    context->decode({{seq, input, first ? prompt.size() : 1, Outputs::kLast}},
                    [&](size_t, size_t, const float* logits) { token = sampler.sample(logits); });
    (first ? prompt_us : generation_us) += llama_time_us() - start;
    if (context->model().is_end_of_generation(token) && !params.ignore_end) {
        reason = StopReason::kEnd;
        return;
    }
    tokens.push_back(token);
    pending += context->model().piece(token);
}

// What of `pending` can be handed out now.
std::string Generation::Impl::release() {
    size_t held = reason == StopReason::kRunning ? cut_character(pending) : 0;
    for (const std::string& stop : params.stop) {
        const size_t found = pending.find(stop);
        if (found != std::string::npos) {
            pending.resize(found);
            reason = StopReason::kStop;
            held = 0;
        } else if (reason == StopReason::kRunning) {
            held = std::max(held, started(pending, stop));
        }
    }
    std::string text = pending.substr(0, pending.size() - held);
    pending.erase(0, text.size());
    return text;
}

std::optional<std::string> Generation::Impl::next() {
    while (reason == StopReason::kRunning) {
        step();
        std::string text = release();
        if (!text.empty()) return text;
    }
    if (!pending.empty()) return std::exchange(pending, {});
    return std::nullopt;
}

Generation::Generation(std::shared_ptr<Context> context, std::vector<int32_t> prompt, const GenerationParams& params,
                       int32_t seq)
    : impl_(std::make_unique<Impl>(std::move(context), std::move(prompt), params, seq)) {}

Generation::~Generation() = default;

std::optional<std::string> Generation::next() { return impl_->next(); }
StopReason Generation::stop_reason() const { return impl_->reason; }
const std::vector<int32_t>& Generation::prompt() const { return impl_->prompt; }
const std::vector<int32_t>& Generation::tokens() const { return impl_->tokens; }
double Generation::prompt_seconds() const { return static_cast<double>(impl_->prompt_us) * 1e-6; }
double Generation::generation_seconds() const { return static_cast<double>(impl_->generation_us) * 1e-6; }
Context& Generation::context() { return *impl_->context; }

}  // namespace moeshard
