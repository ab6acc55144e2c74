#include "moeshard/statistics.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "moeshard/error.hpp"

namespace moeshard {

namespace {

// Of the distribution that is proportional to `scores`, none of them negative.
double entropy_of(const float* scores, int32_t n) {
    float sum = 0;
    float weighted = 0;
    for (int32_t i = 0; i < n; ++i) {
        const float p = scores[i];
        if (!(p > 0)) continue;
        sum += p;
        weighted += p * std::log(p);
    }
    return sum > 0 ? std::log(sum) - weighted / sum : 0;
}

double entropy_of_logits(const float* logits, int32_t n, std::vector<float>& scratch) {
    const float most = *std::max_element(logits, logits + n);
    scratch.resize(static_cast<size_t>(n));
    for (int32_t i = 0; i < n; ++i) scratch[static_cast<size_t>(i)] = std::exp(logits[i] - most);
    return entropy_of(scratch.data(), n);
}

}  // namespace

RoutingStatistics::RoutingStatistics(int32_t n_seq, std::vector<int32_t> layers, int32_t n_expert,
                                     bool scores_are_logits, bool pairs)
    : n_seq_(n_seq),
      layers_(std::move(layers)),
      n_expert_(n_expert),
      scores_are_logits_(scores_are_logits),
      pairs_(pairs) {
    if (n_seq <= 0 || n_expert <= 0) throw Error("statistics need at least one sequence and one expert");
    const size_t rows = static_cast<size_t>(n_seq) * layers_.size();
    const auto experts = static_cast<size_t>(n_expert);
    count.assign(rows * experts, 0);
    mass.assign(rows * experts, 0);
    saliency.assign(rows * experts, 0);
    energy.assign(rows * experts, 0);
    entropy.assign(rows, 0);
    peak.assign(layers_.size() * experts, 0);
    if (!pairs) return;
    together.assign(layers_.size() * experts * experts, 0);
    cosaliency.assign(layers_.size() * experts * experts, 0);
}

void RoutingStatistics::add(const UbatchTrace& trace) {
    for (const int32_t seq : trace.seq) {
        if (seq < 0 || seq >= n_seq_)
            throw Error("statistics of sequence " + std::to_string(seq) + " were not asked for");
    }
    for (const LayerTrace& layer : trace.layers) {
        const auto at = std::find(layers_.begin(), layers_.end(), layer.layer);
        if (at != layers_.end()) add_layer(static_cast<size_t>(at - layers_.begin()), trace.seq, layer);
    }
}

void RoutingStatistics::add_layer(size_t row, const std::vector<int32_t>& seq, const LayerTrace& layer) {
    const auto used = static_cast<size_t>(layer.n_used);
    const auto experts = static_cast<size_t>(n_expert_);
    if (layer.n_expert != n_expert_ || layer.norms.size() != layer.ids.size() ||
        layer.probs.size() != seq.size() * experts) {
        throw Error("statistics need the norms and probs of all experts");
    }
    std::vector<float> scratch;
    std::vector<float> contribution(used);
    for (size_t token = 0; token < seq.size(); ++token) {
        const int32_t* ids = layer.ids.data() + token * used;
        const float* weights = layer.weights.data() + token * used;
        const float* norms = layer.norms.data() + token * used;
        const size_t cell = (static_cast<size_t>(seq[token]) * layers_.size() + row) * experts;
        for (size_t i = 0; i < used; ++i) {
            if (ids[i] < 0 || ids[i] >= n_expert_) throw Error("a trace holds an expert that the model does not have");
            const auto expert = static_cast<size_t>(ids[i]);
            contribution[i] = layer.contribution(token * used + i);
            ++count[cell + expert];
            mass[cell + expert] += weights[i];
            saliency[cell + expert] += contribution[i];
            energy[cell + expert] += static_cast<double>(contribution[i]) * contribution[i];
            peak[row * experts + expert] = std::max(peak[row * experts + expert], norms[i]);
        }
        for (size_t i = 0; pairs_ && i < used; ++i) {
            const size_t pairs = (row * experts + static_cast<size_t>(ids[i])) * experts;
            for (size_t j = 0; j < used; ++j) {
                const size_t pair = pairs + static_cast<size_t>(ids[j]);
                ++together[pair];
                cosaliency[pair] += contribution[i] * contribution[j];
            }
        }
        const float* scores = layer.probs.data() + token * experts;
        entropy[cell / experts] +=
            scores_are_logits_ ? entropy_of_logits(scores, n_expert_, scratch) : entropy_of(scores, n_expert_);
    }
}

}  // namespace moeshard
