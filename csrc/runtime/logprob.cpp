#include "runtime/logprob.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace moeshard {

TokenLogprob logprob_of(const Model& model, const float* logits, int32_t token, int32_t n_top) {
    const auto n_vocab = static_cast<size_t>(model.n_vocab());
    const float peak = *std::max_element(logits, logits + n_vocab);
    double sum = 0.0;
    for (size_t i = 0; i < n_vocab; ++i) sum += std::exp(static_cast<double>(logits[i] - peak));
    const double norm = static_cast<double>(peak) + std::log(sum);
    const auto of = [&](int32_t id) { return static_cast<float>(static_cast<double>(logits[id]) - norm); };
    TokenLogprob found{token, model.piece(token, true), of(token), {}};
    if (n_top > 0) {
        std::vector<int32_t> ids(n_vocab);
        for (size_t i = 0; i < n_vocab; ++i) ids[i] = static_cast<int32_t>(i);
        const auto end = ids.begin() + std::min<std::ptrdiff_t>(n_top, static_cast<std::ptrdiff_t>(n_vocab));
        std::partial_sort(ids.begin(), end, ids.end(),
                          [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
        for (auto id = ids.begin(); id != end; ++id) found.top.emplace_back(*id, of(*id));
    }
    return found;
}

}  // namespace moeshard
