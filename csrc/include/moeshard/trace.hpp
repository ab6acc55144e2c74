// The routing trace: which experts each token was sent to, as the graph computed it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace moeshard {

// What a trace holds besides the chosen ids and their weights.
struct TraceOptions {
    bool probs = false;  // the router's score of every expert, after the gating function
    bool norms = false;  // the L2 norm of each chosen expert's output, before it is weighted
    // Layers (ascending, of those that route) of which the trace also holds what they compute on the way. It then holds
    // no others, and nothing after the last of them is computed. Needs ContextParams::states.
    std::vector<int32_t> states;
};

// One MoE layer of one computed micro-batch. Arrays are row-major, one row per token.
struct LayerTrace {
    int32_t layer = 0;
    int32_t n_used = 0;
    int32_t n_expert = 0;
    std::vector<int32_t> ids;    // (n_tokens, n_used), best first as the model orders them
    std::vector<float> weights;  // (n_tokens, n_used), as the expert outputs are weighted
    // The weights are applied to the experts' inputs instead (Llama 4): `norms` are then of outputs that hold them.
    bool weighs_inputs = false;
    // (n_tokens, n_expert) or empty: probabilities where the gating is a softmax over all experts, independent scores
    // where it is elementwise (sigmoid, sqrt-softplus), and the logits where the softmax comes after the selection.
    // A dropped expert has 0 (-inf among logits), and so has one that the layer of a shard does not hold while others
    // do.
    std::vector<float> probs;
    std::vector<float> norms;  // (n_tokens, n_used) or empty

    // Of TraceOptions::states; else empty.
    std::vector<float> inputs;    // (n_tokens, n_embd): what the router sees
    std::vector<float> hidden;    // (n_tokens, n_used, n_ff): what each chosen expert's down projection is applied to
    std::vector<float> residual;  // (n_tokens, n_embd): the residual stream after the layer
    // What comes of the down projections is multiplied by ffn_down_exps.scale: not all architectures look at that.
    bool scaled = false;

    // The norm of what the i-th of all chosen experts adds to its token. Needs norms.
    float contribution(size_t i) const { return weighs_inputs ? norms[i] : weights[i] * norms[i]; }
};

// What one micro-batch did. Valid during the callback only, which may move the vectors out.
struct UbatchTrace {
    std::vector<int32_t> seq;        // (n_tokens,) sequence of each token
    std::vector<int32_t> pos;        // (n_tokens,) position of each token in its sequence
    std::vector<LayerTrace> layers;  // in layer order

    size_t n_tokens() const { return pos.size(); }
};

using TraceSink = std::function<void(UbatchTrace&)>;

}  // namespace moeshard
