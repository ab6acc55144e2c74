#include "engine/control.hpp"

#include <exception>
#include <functional>
#include <memory>
#include <utility>

#include "engine/hook_state.hpp"
#include "engine/moeshard-hook.h"
#include "llama-ext.h"
#include "llama-impl.h"

namespace moeshard::hook {

void set_mask(llama_context* ctx, int32_t seq, const Keep* keep) {
    State& state = attach(ctx);
    std::shared_ptr<const MaskRows> mask;
    if (keep) {
        keep->check(state.routing);
        mask = state.find(*keep);
        if (!mask) mask = std::make_shared<const MaskRows>(*keep, state.routing);
        state.masked = true;
    }
    if (seq < 0) {
        state.mask_of_all = std::move(mask);
    } else if (mask) {
        state.mask_of_seq[seq] = std::move(mask);
    } else {
        state.mask_of_seq.erase(seq);
    }
}

namespace {

thread_local bool exceptions_may_pass = false;

}  // namespace

bool exceptions_pass(bool pass) { return std::exchange(exceptions_may_pass, pass); }

int32_t run(const std::function<int32_t()>& compute) {
    if (exceptions_may_pass) return compute();
    try {
        return compute();
    } catch (const std::exception& error) {
        LLAMA_LOG_ERROR("%s\n", error.what());
        return -3;
    }
}

void start_trace(llama_context* ctx, const TraceOptions& options, TraceSink sink) {
    State& state = attach(ctx);
    state.tracing = true;
    state.trace = options;
    state.sink = std::move(sink);
}

void stop_trace(llama_context* ctx) {
    State& state = attach(ctx);
    state.tracing = false;
    state.sink = nullptr;
}

void set_routers(llama_context* ctx, std::vector<WholeRouter> routers) {
    State& state = attach(ctx);
    // Graphs that were built refer to them: never replaced.
    if (routers.empty() || state.routers) return;
    state.routers = std::make_shared<const Routers>(state.model, std::move(routers));
}

bool has_routers(llama_context* ctx) { return attach(ctx).routers != nullptr; }

void set_meter(llama_context* ctx, MissedSink sink) {
    State& state = attach(ctx);
    state.metered = sink != nullptr;
    state.missed = std::move(sink);
}

void enable_masks(llama_context* ctx) { attach(ctx); }

MemoryUse memory_of(const llama_context* ctx) {
    MemoryUse sum;
    for (const auto& [type, use] : llama_get_memory_breakdown(ctx)) {
        sum.model += use.model;
        sum.context += use.context;
        sum.compute += use.compute;
    }
    return sum;
}

}  // namespace moeshard::hook
