#include "moeshard/batcher.hpp"

#include <algorithm>
#include <functional>

#include "moeshard/error.hpp"
#include "runtime/guard.hpp"
#include "runtime/logprob.hpp"
#include "runtime/owner.hpp"
#include "runtime/text_output.hpp"

namespace moeshard {

namespace {

bool same_keep(const std::shared_ptr<const Keep>& a, const std::shared_ptr<const Keep>& b) {
    return a == b || (a && b && *a == *b);
}

size_t common_prefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
    return static_cast<size_t>(
        std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(std::min(a.size(), b.size())), b.begin())
            .first -
        a.begin());
}

// A request that is computed.
struct Running {
    Running(const Model& model, int64_t number, Request wanted)
        : id(number),
          request(std::move(wanted)),
          sampler(model, request.params.sampling),
          output(request.params.stop) {}

    bool in_prompt() const { return n_prompt_done < request.prompt.size(); }
    size_t n_tokens() const { return n_given + tokens.size(); }

    int64_t id;
    Request request;
    Sampler sampler;
    TextOutput output;
    size_t n_given = 0;  // tokens of the prompt as it was given; a request that was moved has its answer behind them
    size_t n_prompt_done = 0;
    size_t n_cached = 0;
    std::vector<int32_t> tokens;        // generated
    std::vector<TokenLogprob> waiting;  // of tokens whose text is not handed out yet
    size_t waiting_bytes = 0;
};

// A sequence of the context, and what it remembers.
struct Slot {
    std::vector<int32_t> tokens;
    std::shared_ptr<const Keep> keep;
    std::string scope;
    uint64_t last_used = 0;
    std::unique_ptr<Running> running;
};

}  // namespace

struct Batcher::Impl {
    Impl(std::shared_ptr<const Model> of, const BatcherParams& wanted);

    int64_t submit(Request request);
    void check(const Request& request) const;
    size_t slot_for(const Request& request) const;
    void settle(size_t index, std::unique_ptr<Running> running);
    int64_t move(int64_t id, Impl& to, std::shared_ptr<const Keep> keep);
    void cancel(int64_t id);
    std::vector<Progress> step();
    void gather(std::vector<Input>& inputs);
    void prompt_row(Progress& progress, Running& running, size_t token, const float* logits);
    void draw(Progress& progress, Running& running, const float* logits);
    void hand_out(Progress& progress, Running& running, const std::string& text) const;
    Progress& progress_of(std::vector<Progress>& all, const Running& running) const;
    void end(Slot& slot);

    std::shared_ptr<const Model> model;
    BatcherParams params;
    Context context;
    std::vector<Slot> slots;
    int64_t next_id = 0;
    uint64_t clock = 0;
    size_t first = 0;  // of the slots, whose prompt comes first in the next step
    Owner owner{"batcher"};
};

Batcher::Impl::Impl(std::shared_ptr<const Model> of, const BatcherParams& wanted)
    : model(std::move(of)),
      params(wanted),
      context(model, ContextParams{wanted.n_ctx, std::max(wanted.n_batch, wanted.n_slots), wanted.n_ubatch,
                                   wanted.n_slots, wanted.n_threads}),
      slots(static_cast<size_t>(std::max(wanted.n_slots, 0))) {
    if (params.n_prefill < 1) throw Error("n_prefill must be positive");
    if (model->is_diffusion()) {
        throw Error(model->path() +
                    ": a diffusion model does not write from left to right, which is how text is generated here");
    }
    params.n_ctx = context.n_ctx();
    context.set_meter(params.meter);
}

void Batcher::Impl::check(const Request& request) const {
    if (request.prompt.empty()) throw Error("the prompt is empty: generation needs at least one token to start from");
    if (request.prompt.size() > static_cast<size_t>(params.n_ctx)) {
        throw Error("the prompt has " + std::to_string(request.prompt.size()) + " tokens, and a request can hold " +
                    std::to_string(params.n_ctx) + " (use a larger n_ctx)");
    }
    for (const int32_t token : request.prompt) {
        if (token < 0 || token >= model->n_vocab()) {
            throw Error("token id " + std::to_string(token) + " is outside the vocabulary of " +
                        std::to_string(model->n_vocab()));
        }
    }
    if (request.keep) request.keep->check(model->routing());
}

// The free slot that remembers most of the prompt; of those that remember nothing of it, the one unused for longest.
size_t Batcher::Impl::slot_for(const Request& request) const {
    size_t best = slots.size();
    size_t longest = 0;
    for (size_t i = 0; i < slots.size(); ++i) {
        const Slot& slot = slots[i];
        if (slot.running) continue;
        const bool serves =
            !request.prompt_logprobs && slot.scope == request.scope && same_keep(slot.keep, request.keep);
        const size_t common = serves ? common_prefix(slot.tokens, request.prompt) : 0;
        const bool better =
            best == slots.size() || common > longest || (common == longest && slot.last_used < slots[best].last_used);
        if (better) {
            best = i;
            longest = common;
        }
    }
    if (best == slots.size()) throw Error("all " + std::to_string(slots.size()) + " slots are in use");
    return best;
}

int64_t Batcher::Impl::submit(Request request) {
    check(request);
    const size_t index = slot_for(request);
    auto running = std::make_unique<Running>(*model, next_id, std::move(request));
    running->n_given = running->request.prompt.size();
    for (const int32_t token : running->request.prompt) running->sampler.accept(token);
    settle(index, std::move(running));
    slots[index].running->n_cached = slots[index].running->n_prompt_done;
    return next_id++;
}

// Gives a request a slot; what that remembers of the prompt is not computed again.
void Batcher::Impl::settle(size_t index, std::unique_ptr<Running> running) {
    const Request& wanted = running->request;
    Slot& slot = slots[index];
    const auto seq = static_cast<int32_t>(index);
    size_t common = 0;
    if (!wanted.prompt_logprobs && slot.scope == wanted.scope && same_keep(slot.keep, wanted.keep)) {
        // The last token is computed again: what follows it is drawn from its logits.
        common = std::min(common_prefix(slot.tokens, wanted.prompt), wanted.prompt.size() - 1);
    }
    common = static_cast<size_t>(context.truncate(seq, static_cast<int32_t>(common)));
    slot.tokens.resize(common);
    if (!same_keep(slot.keep, wanted.keep)) context.set_keep(wanted.keep.get(), seq);
    slot.keep = wanted.keep;
    slot.scope = wanted.scope;
    running->n_prompt_done = common;
    slot.running = std::move(running);
}

void Batcher::Impl::end(Slot& slot) {
    slot.running.reset();
    slot.last_used = ++clock;
}

void Batcher::Impl::cancel(int64_t id) {
    for (Slot& slot : slots) {
        if (slot.running && slot.running->id == id) end(slot);
    }
}

int64_t Batcher::Impl::move(int64_t id, Impl& to, std::shared_ptr<const Keep> keep) {
    const auto from = std::find_if(slots.begin(), slots.end(),
                                   [&](const Slot& slot) { return slot.running && slot.running->id == id; });
    if (from == slots.end()) throw Error("request " + std::to_string(id) + " is over");
    const Running& running = *from->running;
    Request request = running.request;
    if (running.in_prompt() && request.prompt_logprobs) throw Error("a prompt that is scored cannot be moved");
    request.prompt.resize(running.n_given);
    request.prompt.insert(request.prompt.end(), running.tokens.begin(), running.tokens.end());
    request.keep = std::move(keep);
    request.prompt_logprobs = false;
    to.check(request);
    const size_t index = &to == this ? static_cast<size_t>(from - slots.begin()) : to.slot_for(request);
    auto moved = std::move(from->running);
    end(*from);
    moved->request = std::move(request);
    moved->id = to.next_id;
    to.settle(index, std::move(moved));
    return to.next_id++;
}

// A token of each request that generates, then as much of the prompts as the budget allows, in turns.
void Batcher::Impl::gather(std::vector<Input>& inputs) {
    for (size_t i = 0; i < slots.size(); ++i) {
        const Running* running = slots[i].running.get();
        if (running && !running->in_prompt()) {
            inputs.push_back({static_cast<int32_t>(i), &running->tokens.back(), 1, Outputs::kLast});
        }
    }
    size_t budget = static_cast<size_t>(std::min(params.n_prefill, params.n_batch));
    size_t last = first;
    for (size_t k = 0; k < slots.size() && budget > 0; ++k) {
        const size_t i = (first + k) % slots.size();
        const Running* running = slots[i].running.get();
        if (!running || !running->in_prompt()) continue;
        const std::vector<int32_t>& prompt = running->request.prompt;
        const size_t n = std::min(budget, prompt.size() - running->n_prompt_done);
        const bool ends = running->n_prompt_done + n == prompt.size();
        const Outputs outputs = running->request.prompt_logprobs ? Outputs::kAll
                                : ends                           ? Outputs::kLast
                                                                 : Outputs::kNone;
        inputs.push_back({static_cast<int32_t>(i), prompt.data() + running->n_prompt_done, n, outputs});
        budget -= n;
        last = ends ? i + 1 : i;
    }
    first = last % slots.size();
}

void Batcher::Impl::hand_out(Progress& progress, Running& running, const std::string& text) const {
    progress.text += text;
    // A token is told when the last of its bytes is; behind a stop text none is.
    const size_t held = running.output.held_back();
    const bool stopped = running.output.stopped();
    size_t n = 0;
    if (stopped) {
        size_t bytes = 0;
        for (; n < running.waiting.size() && bytes < text.size(); ++n) bytes += running.waiting[n].bytes.size();
    } else {
        size_t rest = running.waiting_bytes;
        for (; n < running.waiting.size() && rest > held; ++n) rest -= running.waiting[n].bytes.size();
    }
    for (size_t i = 0; i < n; ++i) {
        running.waiting_bytes -= running.waiting[i].bytes.size();
        progress.logprobs.push_back(std::move(running.waiting[i]));
    }
    running.waiting.erase(running.waiting.begin(), running.waiting.begin() + static_cast<std::ptrdiff_t>(n));
}

void Batcher::Impl::prompt_row(Progress& progress, Running& running, size_t token, const float* logits) {
    const std::vector<int32_t>& prompt = running.request.prompt;
    if (!running.request.prompt_logprobs || token + 1 >= prompt.size()) return;
    progress.logprobs.push_back(logprob_of(*model, logits, prompt[token + 1], std::max(running.request.n_logprobs, 0)));
}

// Draws the next token of a request and says what follows from it.
void Batcher::Impl::draw(Progress& progress, Running& running, const float* logits) {
    const GenerationParams& wanted = running.request.params;
    if (wanted.max_tokens == 0) {
        progress.reason = StopReason::kLength;
        return;
    }
    const int32_t token = running.sampler.sample(logits);
    progress.token = token;
    if (model->is_end_of_generation(token) && !wanted.ignore_end) {
        progress.reason = StopReason::kEnd;
        hand_out(progress, running, running.output.finish());
        return;
    }
    running.tokens.push_back(token);
    if (running.request.n_logprobs >= 0) {
        running.waiting.push_back(logprob_of(*model, logits, token, running.request.n_logprobs));
        running.waiting_bytes += running.waiting.back().bytes.size();
    }
    std::string text = running.output.add(model->piece(token));
    if (running.output.stopped()) {
        progress.reason = StopReason::kStop;
    } else if (wanted.max_tokens > 0 && running.tokens.size() >= static_cast<size_t>(wanted.max_tokens)) {
        progress.reason = StopReason::kLength;
        text += running.output.finish();
    } else if (running.n_tokens() > static_cast<size_t>(params.n_ctx)) {
        progress.reason = StopReason::kContext;
        text += running.output.finish();
    }
    hand_out(progress, running, text);
}

std::vector<Progress> Batcher::Impl::step() {
    std::vector<Input> inputs;
    gather(inputs);
    std::vector<Progress> all;
    if (inputs.empty()) return all;
    for (const Input& input : inputs) {
        Progress progress;
        progress.id = slots[static_cast<size_t>(input.seq)].running->id;
        all.push_back(progress);
    }
    std::string failure;
    try {
        context.decode(inputs, [&](size_t index, size_t row, const float* logits) {
            const Input& input = inputs[index];
            Running& running = *slots[static_cast<size_t>(input.seq)].running;
            Progress& progress = all[index];
            if (!progress.error.empty()) return;
            try {
                if (running.in_prompt()) {
                    const size_t token = running.n_prompt_done + row;
                    prompt_row(progress, running, token, logits);
                    if (token + 1 < running.request.prompt.size()) return;
                }
                draw(progress, running, logits);
            } catch (const EngineAbort&) {
                throw;
            } catch (const std::exception& error) {
                progress.error = error.what();  // of this request alone
            }
        });
    } catch (const EngineAbort&) {
        throw;
    } catch (const std::exception& error) {
        failure = error.what();
    }
    for (size_t index = 0; index < inputs.size(); ++index) {
        const Input& input = inputs[index];
        Slot& slot = slots[static_cast<size_t>(input.seq)];
        Running& running = *slot.running;
        Progress& progress = all[index];
        if (failure.empty()) {
            if (running.in_prompt()) running.n_prompt_done += input.n_tokens;
            slot.tokens.insert(slot.tokens.end(), input.tokens, input.tokens + input.n_tokens);
        } else {
            progress = Progress{};
            progress.id = running.id;
            progress.error = failure;
            slot.tokens.resize(static_cast<size_t>(context.n_past(input.seq)));
        }
        progress.missed = context.missed(input.seq);
        progress.n_prompt = static_cast<int32_t>(running.n_given);
        progress.n_prompt_done = static_cast<int32_t>(std::min(running.n_prompt_done, running.n_given));
        progress.n_cached = static_cast<int32_t>(running.n_cached);
        progress.n_generated = static_cast<int32_t>(running.tokens.size());
        if (progress.over()) end(slot);
    }
    return all;
}

Batcher::Batcher(std::shared_ptr<const Model> model, const BatcherParams& params)
    : impl_(std::make_unique<Impl>(std::move(model), params)) {}

Batcher::~Batcher() = default;

const BatcherParams& Batcher::params() const { return impl_->params; }

int32_t Batcher::n_free() const {
    return static_cast<int32_t>(
        std::count_if(impl_->slots.begin(), impl_->slots.end(), [](const Slot& slot) { return !slot.running; }));
}

int32_t Batcher::n_held() const {
    size_t held = 0;
    for (const Slot& slot : impl_->slots) held += slot.tokens.size();
    return static_cast<int32_t>(held);
}

int64_t Batcher::submit(Request request) {
    const Owner::Use use(impl_->owner);
    return impl_->submit(std::move(request));
}

int64_t Batcher::move(int64_t id, Batcher& to, std::shared_ptr<const Keep> keep) {
    const Owner::Use use(impl_->owner);
    if (&to == this) return impl_->move(id, *impl_, std::move(keep));
    const Owner::Use other(to.impl_->owner);
    return impl_->move(id, *to.impl_, std::move(keep));
}

void Batcher::cancel(int64_t id) {
    const Owner::Use use(impl_->owner);
    impl_->cancel(id);
}

std::vector<Progress> Batcher::step() {
    const Owner::Use use(impl_->owner);
    return impl_->step();
}

void Batcher::abort() { impl_->context.abort(); }
void Batcher::set_interrupt(std::function<bool()> check) { impl_->context.set_interrupt(std::move(check)); }

void Batcher::forget() {
    const Owner::Use use(impl_->owner);
    for (size_t i = 0; i < impl_->slots.size(); ++i) {
        Slot& slot = impl_->slots[i];
        if (slot.running) continue;
        impl_->context.truncate(static_cast<int32_t>(i), 0);
        slot.tokens.clear();
    }
}

}  // namespace moeshard
