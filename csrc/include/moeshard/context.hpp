// What computes: sequences of tokens, a keep for each, logits and routing traces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "moeshard/keep.hpp"
#include "moeshard/memory.hpp"
#include "moeshard/model.hpp"
#include "moeshard/trace.hpp"

namespace moeshard {

struct ContextParams {
    int32_t n_ctx = 0;       // tokens that each sequence can hold; 0: what the model was trained on
    int32_t n_batch = 2048;  // tokens handed to the engine at once
    int32_t n_ubatch = 512;  // tokens computed at once
    int32_t n_seq_max = 1;   // sequences 0 .. n_seq_max-1
    int32_t n_threads = 0;   // 0: as many as the processors this process may use
    // Traces may hold what layers compute on the way (TraceOptions::states). Every graph is then computed piece by
    // piece.
    bool states = false;
};

// For which tokens of an input the logits are computed.
enum class Outputs {
    kNone,
    kLast,
    kAll,
    // As 0.1.0 called them.
    none = kNone,
    last = kLast,
    all = kAll,
};

// Tokens appended to one sequence.
struct Input {
    int32_t seq = 0;
    const int32_t* tokens = nullptr;
    size_t n_tokens = 0;
    Outputs outputs = Outputs::kLast;
};

// Receives the logits (n_vocab floats, valid during the call) after token `token` of input `input`.
using LogitsSink = std::function<void(size_t input, size_t token, const float* logits)>;

// For one thread at a time, except abort(), and not in a process that was forked off: both throw Error. A failed call
// leaves every sequence as it was before, or empty where the model's memory cannot be rolled back (recurrent layers).
class Context {
public:
    Context(std::shared_ptr<const Model> model, const ContextParams& params = {});
    ~Context();
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    const Model& model() const;
    int32_t n_ctx() const;     // tokens that each sequence may hold
    int32_t capacity() const;  // that there is room for, which the engine rounds up
    // Makes n_ctx() another number, up to capacity().
    void limit(int32_t n_ctx);
    int32_t n_seq_max() const;
    int32_t n_past(int32_t seq) const;  // tokens that the sequence holds
    // Of this context and its model. A model that was loaded with ModelParams::simulate says what it would take.
    MemoryUse memory() const;

    // From the next decode on, routes the tokens of `seq` to kept experts only; null clears. seq < 0: all sequences
    // that have no keep of their own. Rebuilds no graph. Throws Error as Keep::check does.
    void set_keep(const Keep* keep, int32_t seq = -1);

    // Measures, from the next decode on, what tokens under a keep miss: see missed(). It costs next to nothing.
    void set_meter(bool on);
    // Of each token that the last decode appended to `seq` under a keep: of the weight that the routers would have
    // given out, had nothing been dropped, the share of dropped experts, from 0 to 1, mean over the layers that
    // computed the token (the last layer computes only tokens with output). Empty without a keep or meter. In a shard
    // file that was written with its whole routers (ShardParams::with_router) every token is measured.
    const std::vector<float>& missed(int32_t seq) const;
    // The same in each MoE layer, (n_tokens, n_layers); NaN where it did not compute the token.
    const std::vector<float>& missed_by_layer(int32_t seq) const;

    // Appends and computes all inputs, at most one per sequence, several of them in one batch where they fit. Throws
    // Error on an unknown token or sequence, when a sequence is full, and when aborted.
    void decode(const std::vector<Input>& inputs, const LogitsSink& sink = {});
    // The same, without logits, handing the routing of every token to `sink`, micro-batch by micro-batch.
    void trace(const std::vector<Input>& inputs, const TraceOptions& options, TraceSink sink);

    // How many micro-batches ran on the graph of the one before. Changing keeps does not end the reuse.
    int32_t n_graph_reuses() const;

    // Empties a sequence (seq < 0: all of them); masks stay.
    void reset(int32_t seq = -1);
    // Forgets all tokens of a sequence but the first `n`, or all where the model's memory cannot be cut there
    // (recurrent layers, a sliding window that moved on). Returns how many it holds now.
    int32_t truncate(int32_t seq, int32_t n);

    // Makes a decode that another thread is in throw Error; the next one runs again.
    void abort();
    // Asked every few milliseconds while computing, on the computing thread; true aborts.
    void set_interrupt(std::function<bool()> check);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace moeshard
