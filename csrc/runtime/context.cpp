#include "moeshard/context.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <set>
#include <string>
#include <utility>

#include "engine/control.hpp"
#include "files/threads.hpp"
#include "ggml-cpu.h"
#include "llama.h"
#include "runtime/batch.hpp"
#include "runtime/guard.hpp"
#include "runtime/missed.hpp"
#include "runtime/owner.hpp"
#include "runtime/tap.hpp"

namespace moeshard {

namespace {

constexpr int64_t kInterruptPeriodUs = 20'000;
// Logits of one batch are held in memory by the engine; with a vocabulary of 150,000 this is 400 rows.
constexpr size_t kMaxLogitsBytes = size_t{256} << 20;

constexpr const char* kBrokenMessage =
    "this context failed inside the engine and cannot be used any more; make a new one";

std::string named(int32_t seq) { return "sequence " + std::to_string(seq); }

}  // namespace

struct Context::Impl {
    Impl(std::shared_ptr<const Model> of, const ContextParams& wanted);
    ~Impl();
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    int32_t capacity() const { return static_cast<int32_t>(llama_n_ctx_seq(ctx)); }
    int32_t n_ctx() const { return limit; }
    int32_t n_past(int32_t seq) const;
    void decode(const std::vector<Input>& inputs, const LogitsSink& sink);
    void trace(const std::vector<Input>& inputs, const TraceOptions& options, TraceSink sink);
    void reset(int32_t seq);
    int32_t truncate(int32_t seq, int32_t n);

    void check(const std::vector<Input>& inputs) const;
    void compute(const std::vector<Input>& inputs, const LogitsSink& sink);
    size_t outputs_per_batch() const;
    void roll_back(const std::vector<int32_t>& to);
    static bool should_abort(void* self);

    std::shared_ptr<const Model> model;
    ContextParams params;
    llama_context* ctx = nullptr;
    ggml_threadpool* pool = nullptr;
    int32_t limit = 0;
    std::vector<int32_t> past;
    std::vector<Missed> missed;  // by sequence
    Owner owner{"context"};
    std::atomic<bool> aborted{false};
    std::function<bool()> interrupt;
    int64_t next_interrupt_us = 0;
    bool broken = false;  // the engine aborted inside; nothing of it may be touched again
    Tap tap;
};

Context::Impl::Impl(std::shared_ptr<const Model> of, const ContextParams& wanted)
    : model(std::move(of)), params(wanted) {
    if (params.n_ctx < 0 || params.n_batch < 1 || params.n_ubatch < 1 || params.n_seq_max < 1) {
        throw Error("context parameters must be positive (n_ctx may be 0)");
    }
    if (params.n_ctx == 0) params.n_ctx = std::max(model->n_ctx_train(), 1);
    const auto most = static_cast<int32_t>(llama_max_parallel_sequences());
    if (params.n_seq_max > most) throw Error("at most " + std::to_string(most) + " sequences fit in one context");
    if (model->is_diffusion()) params.n_batch = params.n_ubatch = params.n_ctx;
    params.n_threads = files::threads_wanted(params.n_threads, "n_threads");
    // The engine ends the process where it cannot start one.
    params.n_threads = 1 + files::startable_threads(params.n_threads - 1);

    const uint64_t n_total = static_cast<uint64_t>(params.n_ctx) * static_cast<uint64_t>(params.n_seq_max);
    // The engine rounds up, and counts positions in 32 bits.
    if (n_total > static_cast<uint64_t>(std::numeric_limits<int32_t>::max()) - 1024) {
        throw Error(std::to_string(params.n_seq_max) + " sequences of " + std::to_string(params.n_ctx) +
                    " tokens are more than a context can count; use fewer of them or a smaller n_ctx");
    }
    const Guard guard;
    llama_context_params native = llama_context_default_params();
    native.n_ctx = static_cast<uint32_t>(n_total);
    native.n_batch = static_cast<uint32_t>(params.n_batch);
    native.n_ubatch = static_cast<uint32_t>(params.n_ubatch);
    native.n_seq_max = static_cast<uint32_t>(params.n_seq_max);
    native.n_threads = params.n_threads;
    native.n_threads_batch = params.n_threads;
    native.abort_callback = should_abort;
    native.abort_callback_data = this;
    if (params.states) {
        native.cb_eval = Tap::callback;
        native.cb_eval_user_data = &tap;
    }
    const std::string failed =
        model->path() + ": no context of " + std::to_string(params.n_ctx) + " tokens could be made";
    ctx = guard.run(failed, [&] { return llama_init_from_model(model->handle(), native); });
    if (!ctx) throw guard.error(failed);

    const ggml_threadpool_params threads = ggml_threadpool_params_default(params.n_threads);
    pool = ggml_threadpool_new(const_cast<ggml_threadpool_params*>(&threads));
    if (pool) llama_attach_threadpool(ctx, pool, pool);
    hook::enable_masks(ctx);
    past.assign(static_cast<size_t>(params.n_seq_max), 0);
    missed.resize(past.size());
    limit = std::min(params.n_ctx, capacity());
}

Context::Impl::~Impl() {
    // What an abort left half done, and what belongs to threads of another process: leaking is all that is safe.
    if (broken || !owner.is_own_process()) return;
    llama_free(ctx);
    if (pool) ggml_threadpool_free(pool);
}

int32_t Context::Impl::n_past(int32_t seq) const {
    if (seq < 0 || seq >= params.n_seq_max) {
        throw Error(named(seq) + " does not exist: this context has " + std::to_string(params.n_seq_max));
    }
    return past[static_cast<size_t>(seq)];
}

void Context::Impl::check(const std::vector<Input>& inputs) const {
    if (broken) throw Error(kBrokenMessage);
    std::set<int32_t> seen;
    for (const Input& input : inputs) {
        const int32_t held = n_past(input.seq);
        if (!seen.insert(input.seq).second) throw Error(named(input.seq) + " is given twice in one call");
        const size_t room = static_cast<size_t>(std::max(n_ctx() - held, 0));
        if (input.n_tokens > room) {
            throw Error(named(input.seq) + " holds " + std::to_string(held) + " of " + std::to_string(n_ctx()) +
                        " tokens; " + std::to_string(input.n_tokens) + " more do not fit (use a larger n_ctx)");
        }
        for (size_t i = 0; i < input.n_tokens; ++i) {
            if (input.tokens[i] < 0 || input.tokens[i] >= model->n_vocab()) {
                throw Error("token id " + std::to_string(input.tokens[i]) + " at position " + std::to_string(i) +
                            " is outside the vocabulary of " + std::to_string(model->n_vocab()));
            }
        }
    }
}

void Context::Impl::decode(const std::vector<Input>& inputs, const LogitsSink& sink) {
    check(inputs);
    const std::vector<int32_t> before = past;
    aborted = false;
    for (Missed& own : missed) own.clear();
    try {
        compute(inputs, sink);
    } catch (const EngineAbort&) {
        broken = true;
        // The other threads wait for this one, spinning; a stopped pool lets them go.
        if (pool) ggml_threadpool_free(std::exchange(pool, nullptr));
        throw;
    } catch (...) {
        roll_back(before);
        throw;
    }
}

size_t Context::Impl::outputs_per_batch() const {
    const size_t row = static_cast<size_t>(std::max(model->n_vocab(), 1)) * sizeof(float);
    return std::max<size_t>(kMaxLogitsBytes / row, 16);
}

void Context::Impl::compute(const std::vector<Input>& inputs, const LogitsSink& sink) {
    const Guard guard;
    std::vector<size_t> done(inputs.size(), 0);
    struct Output {
        size_t input;
        size_t token;
        int32_t row;
    };
    size_t n_tokens = 0;
    for (const Input& input : inputs) n_tokens += input.n_tokens;
    if (n_tokens == 0) return;
    // The engine allocates for every token that a batch could hold, which is felt when single tokens are decoded.
    Batch batch(static_cast<int32_t>(std::min(n_tokens, static_cast<size_t>(params.n_batch))));
    for (;;) {
        size_t unfinished = 0;
        for (size_t i = 0; i < inputs.size(); ++i) unfinished += done[i] < inputs[i].n_tokens;
        if (unfinished == 0) return;

        batch.native.n_tokens = 0;
        std::vector<Output> outputs;
        // Sequences of one length are computed side by side, so all get the same share; but what fits is not cut.
        const bool fits = n_tokens <= static_cast<size_t>(params.n_batch);
        const size_t share = fits ? n_tokens : std::max<size_t>(static_cast<size_t>(params.n_batch) / unfinished, 1);
        const size_t most_outputs = std::max<size_t>(outputs_per_batch() / unfinished, 1);
        for (size_t i = 0; i < inputs.size(); ++i) {
            const Input& input = inputs[i];
            const bool all = input.outputs == Outputs::kAll && sink;
            size_t n = std::min(
                {input.n_tokens - done[i], share, static_cast<size_t>(params.n_batch - batch.native.n_tokens)});
            // Where attention is not causal a sequence cannot be cut.
            if (all && !model->is_diffusion()) n = std::min(n, most_outputs);
            auto& held = past[static_cast<size_t>(input.seq)];
            for (size_t k = 0; k < n; ++k) {
                const size_t token = done[i]++;
                const bool last = input.outputs != Outputs::kNone && token + 1 == input.n_tokens;
                const bool output = sink && (all || last);
                if (output) outputs.push_back({i, token, batch.native.n_tokens});
                batch.add(input.tokens[token], held++, input.seq, output);
            }
        }
        // The engine wants an output; the last token's is the cheapest to ignore.
        if (outputs.empty()) batch.native.logits[batch.native.n_tokens - 1] = true;

        const int32_t status =
            guard.run("the engine could not decode", [&] { return llama_decode(ctx, batch.native); });
        if (status == 2) throw Error("the computation was aborted");
        if (status != 0) throw guard.error("the engine could not decode (status " + std::to_string(status) + ")");
        llama_synchronize(ctx);
        for (const Output& output : outputs) {
            const float* logits = llama_get_logits_ith(ctx, output.row);
            if (!logits)
                throw guard.error(model->path() + ": this model computes no logits (is it an embedding model?)");
            sink(output.input, output.token, logits);
        }
    }
}

void Context::Impl::trace(const std::vector<Input>& inputs, const TraceOptions& options, TraceSink sink) {
    if (model->routing().moe_layers().empty()) throw Error(model->path() + ": a dense model has no routing to trace");
    if (!options.states.empty() && !params.states) throw Error("this context was not made to hand out states");
    struct Tracing {
        llama_context* ctx;
        Tap& tap;
        ~Tracing() {
            hook::stop_trace(ctx);
            tap.end();
        }
    };
    // What the sink throws is its caller's, and comes out as it went in: it passes the engine, whose own exceptions
    // become Errors.
    std::exception_ptr from_sink;
    hook::start_trace(ctx, options, [&](UbatchTrace& chunk) {
        try {
            if (!options.states.empty()) tap.hand_over(chunk);
            sink(chunk);
        } catch (...) {
            from_sink = std::current_exception();
            throw;
        }
    });
    const Tracing tracing{ctx, tap};
    tap.begin(options.states);
    try {
        decode(inputs, {});
    } catch (...) {
        if (from_sink) std::rethrow_exception(from_sink);
        throw;
    }
}

void Context::Impl::roll_back(const std::vector<int32_t>& to) {
    llama_memory_t memory = llama_get_memory(ctx);
    for (int32_t seq = 0; seq < params.n_seq_max; ++seq) {
        auto& held = past[static_cast<size_t>(seq)];
        const int32_t before = to[static_cast<size_t>(seq)];
        if (held == before) continue;
        held = before;
        if (memory && !llama_memory_seq_rm(memory, seq, before, -1)) reset(seq);
    }
}

void Context::Impl::reset(int32_t seq) {
    if (broken) throw Error(kBrokenMessage);
    if (seq >= 0) n_past(seq);  // exists
    if (llama_memory_t memory = llama_get_memory(ctx)) {
        if (seq < 0) {
            llama_memory_clear(memory, true);  // recurrent memory refuses to remove "all sequences"
        } else {
            llama_memory_seq_rm(memory, seq, -1, -1);
        }
    }
    for (int32_t i = 0; i < params.n_seq_max; ++i) {
        if (seq < 0 || i == seq) past[static_cast<size_t>(i)] = 0;
    }
}

int32_t Context::Impl::truncate(int32_t seq, int32_t n) {
    if (broken) throw Error(kBrokenMessage);
    if (n < 0) throw Error("a sequence cannot be cut to " + std::to_string(n) + " tokens");
    if (n >= n_past(seq)) return n_past(seq);
    llama_memory_t memory = llama_get_memory(ctx);
    const bool cut = n > 0 && memory && llama_memory_seq_rm(memory, seq, n, -1);
    // What a token still looks back on must be there.
    const int32_t window = llama_model_n_swa(model->handle());
    const int32_t oldest = window > 0 ? std::max(0, n - window) : 0;
    if (!cut || llama_memory_seq_pos_min(memory, seq) > oldest) {
        reset(seq);
        return 0;
    }
    past[static_cast<size_t>(seq)] = n;
    return n;
}

bool Context::Impl::should_abort(void* self) {
    auto& context = *static_cast<Impl*>(self);
    if (context.aborted) return true;
    if (!context.interrupt) return false;
    const int64_t now = llama_time_us();
    if (now < context.next_interrupt_us) return false;
    context.next_interrupt_us = now + kInterruptPeriodUs;
    return context.interrupt();
}

Context::Context(std::shared_ptr<const Model> model, const ContextParams& params)
    : impl_(std::make_unique<Impl>(std::move(model), params)) {}

Context::~Context() = default;

const Model& Context::model() const { return *impl_->model; }
int32_t Context::n_ctx() const { return impl_->n_ctx(); }
int32_t Context::n_seq_max() const { return impl_->params.n_seq_max; }
int32_t Context::n_past(int32_t seq) const { return impl_->n_past(seq); }
int32_t Context::n_graph_reuses() const { return llama_perf_context(impl_->ctx).n_reused; }
MemoryUse Context::memory() const { return hook::memory_of(impl_->ctx); }

int32_t Context::capacity() const { return impl_->capacity(); }

void Context::limit(int32_t n_ctx) {
    const Owner::Use use(impl_->owner);
    if (n_ctx < 1 || n_ctx > impl_->capacity()) {
        throw Error("a limit of " + std::to_string(n_ctx) + " tokens: this context has room for " +
                    std::to_string(impl_->capacity()));
    }
    impl_->limit = n_ctx;
}

void Context::set_keep(const Keep* keep, int32_t seq) {
    const Owner::Use use(impl_->owner);
    if (seq >= 0) n_past(seq);  // exists
    hook::set_mask(impl_->ctx, seq, keep);
}

void Context::set_meter(bool on) {
    const Owner::Use use(impl_->owner);
    meter(impl_->ctx, *impl_->model, on ? &impl_->missed : nullptr);
}

const std::vector<float>& Context::missed(int32_t seq) const {
    impl_->n_past(seq);  // exists
    return impl_->missed[static_cast<size_t>(seq)].mean;
}

const std::vector<float>& Context::missed_by_layer(int32_t seq) const {
    impl_->n_past(seq);  // exists
    return impl_->missed[static_cast<size_t>(seq)].by_layer;
}

void Context::decode(const std::vector<Input>& inputs, const LogitsSink& sink) {
    const Owner::Use use(impl_->owner);
    impl_->decode(inputs, sink);
}

void Context::trace(const std::vector<Input>& inputs, const TraceOptions& options, TraceSink sink) {
    const Owner::Use use(impl_->owner);
    impl_->trace(inputs, options, std::move(sink));
}

void Context::reset(int32_t seq) {
    const Owner::Use use(impl_->owner);
    impl_->reset(seq);
}

int32_t Context::truncate(int32_t seq, int32_t n) {
    const Owner::Use use(impl_->owner);
    return impl_->truncate(seq, n);
}
void Context::abort() { impl_->aborted = true; }
void Context::set_interrupt(std::function<bool()> check) { impl_->interrupt = std::move(check); }

}  // namespace moeshard
