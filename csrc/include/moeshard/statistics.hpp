// Sums over routing traces: what a profile is made of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "moeshard/trace.hpp"

namespace moeshard {

// Of the tokens of sequences 0 .. n_seq-1 in some layers of a model. Arrays are row-major; a *weight* is what an
// expert's output is multiplied by, a *norm* the L2 norm of that output before, and a *contribution* the norm after:
// weight x norm, but where the norm holds the weight already (see LayerTrace).
class RoutingStatistics {
public:
    // `scores_are_logits`: the router's scores have yet to go through a softmax (gpt-oss). Without `pairs`, which take
    // by far the most room, `together` and `cosaliency` stay empty.
    RoutingStatistics(int32_t n_seq, std::vector<int32_t> layers, int32_t n_expert, bool scores_are_logits,
                      bool pairs = true);

    // Layers that are not among those asked for are skipped. The trace must hold norms and probs. Throws Error on a
    // sequence or an expert that is out of range.
    void add(const UbatchTrace& trace);

    std::vector<int32_t> count;     // (n_seq, n_layers, n_expert): tokens that chose the expert
    std::vector<double> mass;       // the same shape: sum of its weights
    std::vector<double> saliency;   // the same shape: sum of its contributions
    std::vector<double> energy;     // the same shape: sum of the squares of its contributions
    std::vector<double> entropy;    // (n_seq, n_layers): sum of the entropies of the router's distribution, nats
    std::vector<float> peak;        // (n_layers, n_expert): the largest norm
    std::vector<int32_t> together;  // (n_layers, n_expert, n_expert): tokens that chose both
    std::vector<float> cosaliency;  // the same shape: sum of the products of both contributions

    const std::vector<int32_t>& layers() const { return layers_; }
    int32_t n_seq() const { return n_seq_; }
    int32_t n_expert() const { return n_expert_; }

private:
    void add_layer(size_t row, const std::vector<int32_t>& seq, const LayerTrace& layer);

    int32_t n_seq_;
    std::vector<int32_t> layers_;
    int32_t n_expert_;
    bool scores_are_logits_;
    bool pairs_;
};

}  // namespace moeshard
