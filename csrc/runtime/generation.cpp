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

Generation::Generation(std::shared_ptr<Context> context, std::vector<int32_t> prompt, const GenerationParams& wanted,
                       int32_t seq)
    : context_(std::move(context)),
      prompt_(std::move(prompt)),
      params(wanted),
      seq(seq),
      sampler(context_->model(), wanted.sampling) {
    if (context_->model().is_diffusion()) {
        throw Error(context_->model().path() +
                    ": a diffusion model does not write from left to right, which is how text is generated here");
    }
    if (prompt_.empty()) throw Error("the prompt is empty: generation needs at least one token to start from");
    params.stop.erase(std::remove(params.stop.begin(), params.stop.end(), ""), params.stop.end());
    for (const int32_t token : prompt_) sampler.accept(token);
}

// Computes the newest token (at first the prompt) and draws the one after it.
void Generation::step() {
    const bool first = tokens_.empty();
    if (params.max_tokens >= 0 && tokens_.size() >= static_cast<size_t>(params.max_tokens)) {
        reason = StopReason::length;
        return;
    }
    if (!first && context_->n_past(seq) >= context_->n_ctx()) {
        reason = StopReason::context;
        return;
    }
    const int64_t start = llama_time_us();
    const int32_t* input = first ? prompt_.data() : &tokens_.back();
    int32_t token = 0;
    context_->decode({{seq, input, first ? prompt_.size() : 1, Outputs::last}},
                     [&](size_t, size_t, const float* logits) { token = sampler.sample(logits); });
    (first ? prompt_us : generation_us) += llama_time_us() - start;
    if (context_->model().is_end_of_generation(token) && !params.ignore_end) {
        reason = StopReason::end;
        return;
    }
    tokens_.push_back(token);
    pending += context_->model().piece(token);
}

// What of `pending` can be handed out now.
std::string Generation::release() {
    size_t held = reason == StopReason::running ? cut_character(pending) : 0;
    for (const std::string& stop : params.stop) {
        const size_t found = pending.find(stop);
        if (found != std::string::npos) {
            pending.resize(found);
            reason = StopReason::stop;
            held = 0;
        } else if (reason == StopReason::running) {
            held = std::max(held, started(pending, stop));
        }
    }
    std::string text = pending.substr(0, pending.size() - held);
    pending.erase(0, text.size());
    return text;
}

std::optional<std::string> Generation::next() {
    while (reason == StopReason::running) {
        step();
        std::string text = release();
        if (!text.empty()) return text;
    }
    if (!pending.empty()) return std::exchange(pending, {});
    return std::nullopt;
}

}  // namespace moeshard
