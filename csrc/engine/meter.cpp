#include "engine/meter.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moeshard::hook {

namespace {

// A weight, up to a factor that all experts of the token share.
float weight_of(float logit, Gate::Function function, float peak) {
    switch (function) {
        case Gate::Function::kSigmoid:
            return 1.0f / (1.0f + std::exp(-logit));
        case Gate::Function::kSqrtSoftplus:
            return std::sqrt(logit > 20.0f ? logit : std::log1p(std::exp(logit)));
        default:
            return std::exp(logit - peak);
    }
}

// Drops all groups but those whose two best experts have the largest sums.
void keep_best_groups(std::vector<float>& scores, const Gate& gate, std::vector<int32_t>& order) {
    const auto n_group = static_cast<size_t>(gate.n_group);
    const size_t size = scores.size() / n_group;
    std::vector<float> sums(n_group);
    for (size_t group = 0; group < n_group; ++group) {
        const auto begin = scores.begin() + static_cast<std::ptrdiff_t>(group * size);
        const auto end = begin + static_cast<std::ptrdiff_t>(size);
        const auto best = std::max_element(begin, end);
        float second = -INFINITY;
        for (auto at = begin; at != end; ++at) {
            if (at != best) second = std::max(second, *at);
        }
        sums[group] = size > 1 ? *best + second : *best;
    }
    order.resize(n_group);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return sums[static_cast<size_t>(a)] > sums[static_cast<size_t>(b)]; });
    for (size_t i = static_cast<size_t>(gate.n_group_used); i < n_group; ++i) {
        const auto begin = scores.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(order[i]) * size);
        std::fill(begin, begin + static_cast<std::ptrdiff_t>(size), -INFINITY);
    }
}

// The `n_used` experts with the best scores, the lower id first among equals. They are few, and most experts are not
// among them: a short list kept in order is quicker than a sort.
void best_of(const float* scores, int32_t n_expert, size_t n_used, std::vector<int32_t>& best) {
    best.clear();
    for (int32_t expert = 0; expert < n_expert; ++expert) {
        const bool full = best.size() == n_used;
        if (full && scores[expert] <= scores[best.back()]) continue;
        if (full) best.pop_back();
        auto at = best.end();
        while (at != best.begin() && scores[*(at - 1)] < scores[expert]) --at;
        best.insert(at, expert);
    }
}

}  // namespace

float missed_share(const float* logits, int32_t n_expert, const Gate& gate, const uint8_t* keep, const int32_t* ids,
                   GateScratch& scratch) {
    std::vector<float>& scores = scratch.scores;
    std::vector<int32_t>& order = scratch.order;
    const auto n = static_cast<size_t>(n_expert);
    const auto n_used = static_cast<size_t>(std::min(gate.n_used, n_expert));
    const float peak = gate.function == Gate::Function::kSoftmax ? *std::max_element(logits, logits + n) : 0.0f;
    if (ids) {
        order.assign(ids, ids + n_used);
    } else {
        // The function leaves logits in their order, so that it matters only where something is added to it.
        const float* by = logits;
        if (!gate.bias.empty() || gate.n_group > 1) {
            scores.assign(logits, logits + n);
            for (float& score : scores) score = weight_of(score, gate.function, peak);
            if (gate.function == Gate::Function::kSoftmax) {
                const float sum = std::accumulate(scores.begin(), scores.end(), 0.0f);
                for (float& score : scores) score /= sum;
            }
            for (size_t i = 0; i < gate.bias.size(); ++i) scores[i] += gate.bias[i];
            if (gate.n_group > 1) keep_best_groups(scores, gate, order);
            by = scores.data();
        }
        best_of(by, n_expert, n_used, order);
    }
    double all = 0.0;
    double missed = 0.0;
    for (const int32_t expert : order) {
        const double weight = weight_of(logits[expert], gate.function, peak);
        all += weight;
        if (!keep[expert]) missed += weight;
    }
    return all > 0.0 ? static_cast<float>(missed / all) : 0.0f;
}

}  // namespace moeshard::hook
