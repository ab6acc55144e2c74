#include "moeshard/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "llama.h"
#include "runtime/guard.hpp"

namespace moeshard {

namespace {

// Up to so many, a heap of them is quicker than what llama.cpp does.
constexpr int32_t kMostBest = 256;
constexpr const char* kNan = "the model computed NaN logits; the file or the masks are broken";

void check(const SamplingParams& params, int32_t n_vocab) {
    if (!std::isfinite(params.temperature)) throw Error("temperature must be a finite number");
    if (!(params.top_p > 0.0f && params.top_p <= 1.0f)) throw Error("top_p must be in (0, 1]");
    if (!(params.min_p >= 0.0f && params.min_p <= 1.0f)) throw Error("min_p must be in [0, 1]");
    if (!(params.repeat_penalty > 0.0f) || !std::isfinite(params.repeat_penalty)) {
        throw Error("repeat_penalty must be positive");
    }
    if (!std::isfinite(params.frequency_penalty)) throw Error("frequency_penalty must be a finite number");
    if (!std::isfinite(params.presence_penalty)) throw Error("presence_penalty must be a finite number");
    for (const auto& [token, bias] : params.logit_bias) {
        if (token < 0 || token >= n_vocab) {
            throw Error("logit_bias: token id " + std::to_string(token) + " is outside the vocabulary of " +
                        std::to_string(n_vocab));
        }
        if (std::isnan(bias)) throw Error("logit_bias: the bias of token " + std::to_string(token) + " is no number");
    }
}

}  // namespace

struct Sampler::Impl {
    Impl() = default;
    ~Impl() {
        llama_sampler_free(chain);
        if (grammar) llama_sampler_free(grammar);
    }
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    void add(llama_sampler* sampler) { llama_sampler_chain_add(chain, sampler); }
    bool allows(int32_t token) const;
    int32_t draw(const Guard& guard);
    void fill(const float* logits);
    void fill_with_best(const float* logits, size_t n);

    int32_t n_vocab = 0;
    // How many of the likeliest tokens are all that the chain looks at; 0: it changes scores before it chooses.
    size_t n_best = 0;
    llama_sampler* chain = nullptr;
    llama_sampler* of_prompt = nullptr;  // of the chain; the only one that the prompt's tokens count for
    llama_sampler* grammar = nullptr;
    // The engine's own penalties look back over a ring of a fixed length, these over everything that was generated.
    float frequency_penalty = 0.0f;
    float presence_penalty = 0.0f;
    std::unordered_map<int32_t, int32_t> generated;  // how often each token was
    std::vector<llama_token_data> candidates;        // kept between tokens
    bool sorted = false;                             // the likeliest first
};

Sampler::Sampler(const Model& model, const SamplingParams& params) : impl_(std::make_unique<Impl>()) {
    const int32_t n_vocab = impl_->n_vocab = model.n_vocab();
    check(params, n_vocab);
    const Guard guard;
    impl_->chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    if (!params.grammar.empty()) {
        impl_->grammar =
            llama_sampler_init_grammar(llama_model_get_vocab(model.handle()), params.grammar.c_str(), "root");
        if (!impl_->grammar) throw guard.error("the grammar cannot be read (GBNF with a rule named root)");
    }
    if (!params.logit_bias.empty()) {
        std::vector<llama_logit_bias> biases;
        for (const auto& [token, bias] : params.logit_bias) biases.push_back({token, bias});
        impl_->add(llama_sampler_init_logit_bias(n_vocab, static_cast<int32_t>(biases.size()), biases.data()));
    }
    if (params.repeat_penalty != 1.0f) {
        const int32_t last_n = params.repeat_last_n < 0 ? 64 : params.repeat_last_n;
        impl_->of_prompt = llama_sampler_init_penalties(n_vocab, last_n, params.repeat_penalty, 0.0f, 0.0f);
        impl_->add(impl_->of_prompt);
    }
    impl_->frequency_penalty = params.frequency_penalty;
    impl_->presence_penalty = params.presence_penalty;
    if (params.logit_bias.empty() && !impl_->of_prompt && params.frequency_penalty == 0.0f &&
        params.presence_penalty == 0.0f) {
        const int32_t n_best = params.temperature <= 0.0f ? 1 : params.top_k;
        impl_->n_best = n_best > 0 && n_best <= kMostBest ? static_cast<size_t>(std::min(n_best, n_vocab)) : 0;
    }
    if (params.temperature <= 0.0f) {
        impl_->add(llama_sampler_init_greedy());
        return;
    }
    if (params.top_k > 0) impl_->add(llama_sampler_init_top_k(params.top_k));
    if (params.top_p < 1.0f) impl_->add(llama_sampler_init_top_p(params.top_p, 1));
    if (params.min_p > 0.0f) impl_->add(llama_sampler_init_min_p(params.min_p, 1));
    impl_->add(llama_sampler_init_temp(params.temperature));
    impl_->add(llama_sampler_init_dist(params.seed));
}

Sampler::~Sampler() = default;

void Sampler::Impl::fill(const float* logits) {
    sorted = false;
    candidates.resize(static_cast<size_t>(n_vocab));
    for (int32_t id = 0; id < n_vocab; ++id) {
        if (std::isnan(logits[id])) throw Error(kNan);
        candidates[static_cast<size_t>(id)] = {id, logits[id], 0.0f};
    }
    for (const auto& [id, count] : generated) {
        candidates[static_cast<size_t>(id)].logit -= static_cast<float>(count) * frequency_penalty + presence_penalty;
    }
}

// What a chain that begins with these would keep, the earlier one where two are alike: in a large vocabulary candidates
// for all of it are more work than all that follows.
void Sampler::Impl::fill_with_best(const float* logits, size_t n) {
    const auto better = [](const llama_token_data& a, const llama_token_data& b) {
        return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
    };
    sorted = true;
    candidates.clear();
    float least = -INFINITY;  // of a full heap, whose front it is
    for (int32_t id = 0; id < n_vocab; ++id) {
        const float logit = logits[id];
        if (candidates.size() == n && logit <= least) continue;
        if (std::isnan(logit)) throw Error(kNan);
        if (candidates.size() == n) {
            std::pop_heap(candidates.begin(), candidates.end(), better);
            candidates.pop_back();
        }
        candidates.push_back({id, logit, 0.0f});
        std::push_heap(candidates.begin(), candidates.end(), better);
        least = candidates.front().logit;
    }
    std::sort_heap(candidates.begin(), candidates.end(), better);
}

int32_t Sampler::Impl::draw(const Guard& guard) {
    llama_token_data_array array = {candidates.data(), candidates.size(), -1, sorted};
    llama_sampler_apply(chain, &array);
    if (array.selected < 0) throw guard.error("the sampler chose no token");
    return array.data[array.selected].id;
}

bool Sampler::Impl::allows(int32_t token) const {
    llama_token_data single = {token, 1.0f, 0.0f};
    llama_token_data_array array = {&single, 1, -1, false};
    llama_sampler_apply(grammar, &array);
    return single.logit != -INFINITY;
}

int32_t Sampler::n_vocab() const { return impl_->n_vocab; }

int32_t Sampler::sample(const float* logits) {
    const Guard guard;
    if (impl_->n_best > 0) {
        impl_->fill_with_best(logits, impl_->n_best);
    } else {
        impl_->fill(logits);
    }
    int32_t token = impl_->draw(guard);
    // Trying one token is quick, trying the whole vocabulary is not: that is done where the one drawn does not fit.
    if (impl_->grammar && !impl_->allows(token)) {
        impl_->fill(logits);
        llama_token_data_array array = {impl_->candidates.data(), impl_->candidates.size(), -1, false};
        llama_sampler_apply(impl_->grammar, &array);
        token = impl_->draw(guard);
        if (!impl_->allows(token)) throw Error("no token fits the grammar here");
    }
    if (impl_->grammar) llama_sampler_accept(impl_->grammar, token);
    llama_sampler_accept(impl_->chain, token);
    if (impl_->frequency_penalty != 0.0f || impl_->presence_penalty != 0.0f) ++impl_->generated[token];
    return token;
}

void Sampler::accept(int32_t token) {
    if (impl_->of_prompt) llama_sampler_accept(impl_->of_prompt, token);
}

}  // namespace moeshard
