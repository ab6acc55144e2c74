// How likely a token was.
#pragma once

#include "moeshard/batcher.hpp"

namespace moeshard {

// The log-probability of `token` by its logits, and of the `n_top` likeliest tokens.
TokenLogprob logprob_of(const Model& model, const float* logits, int32_t token, int32_t n_top);

}  // namespace moeshard
