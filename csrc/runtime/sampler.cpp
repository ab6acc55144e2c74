#include <cmath>
#include <vector>

#include "llama.h"
#include "moeshard/generation.hpp"
#include "runtime/guard.hpp"

namespace moeshard {

struct Sampler::Impl {
    Impl() = default;
    ~Impl() { llama_sampler_free(chain); }
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    int32_t n_vocab = 0;
    llama_sampler* chain = nullptr;
};

Sampler::Sampler(const Model& model, const SamplingParams& params) : impl_(std::make_unique<Impl>()) {
    if (!std::isfinite(params.temperature)) throw Error("temperature must be a finite number");
    if (!(params.top_p > 0.0f && params.top_p <= 1.0f)) throw Error("top_p must be in (0, 1]");
    if (!(params.min_p >= 0.0f && params.min_p <= 1.0f)) throw Error("min_p must be in [0, 1]");
    if (!(params.repeat_penalty > 0.0f)) throw Error("repeat_penalty must be positive");
    const Guard guard;
    const int32_t n_vocab = impl_->n_vocab = model.n_vocab();
    llama_sampler* chain = impl_->chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    if (params.repeat_penalty != 1.0f) {
        const int32_t last_n = params.repeat_last_n < 0 ? 64 : params.repeat_last_n;
        llama_sampler_chain_add(chain,
                                llama_sampler_init_penalties(n_vocab, last_n, params.repeat_penalty, 0.0f, 0.0f));
    }
    if (params.temperature <= 0.0f) {
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        return;
    }
    if (params.top_k > 0) llama_sampler_chain_add(chain, llama_sampler_init_top_k(params.top_k));
    if (params.top_p < 1.0f) llama_sampler_chain_add(chain, llama_sampler_init_top_p(params.top_p, 1));
    if (params.min_p > 0.0f) llama_sampler_chain_add(chain, llama_sampler_init_min_p(params.min_p, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_temp(params.temperature));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(params.seed));
}

Sampler::~Sampler() = default;

int32_t Sampler::sample(const float* logits) {
    const Guard guard;
    const int32_t n_vocab = impl_->n_vocab;
    std::vector<llama_token_data> candidates;
    candidates.reserve(static_cast<size_t>(n_vocab));
    for (int32_t id = 0; id < n_vocab; ++id) {
        if (std::isnan(logits[id])) throw Error("the model computed NaN logits; the file or the masks are broken");
        candidates.push_back({id, logits[id], 0.0f});
    }
    llama_token_data_array array = {candidates.data(), candidates.size(), -1, false};
    llama_sampler_apply(impl_->chain, &array);
    if (array.selected < 0) throw guard.error("the sampler chose no token");
    const int32_t token = array.data[array.selected].id;
    accept(token);
    return token;
}

void Sampler::accept(int32_t token) { llama_sampler_accept(impl_->chain, token); }

}  // namespace moeshard
