#include "moeshard/model.hpp"

#include <algorithm>

#include "engine/control.hpp"
#include "files/stream.hpp"
#include "llama.h"
#include "moeshard/moe_layout.hpp"
#include "runtime/guard.hpp"
#include "runtime/precheck.hpp"
#include "runtime/workers.hpp"

namespace moeshard {

namespace {

bool report_progress(float fraction, void* progress) {
    const auto& callback = *static_cast<const std::function<bool(float)>*>(progress);
    return !callback || callback(fraction);
}

// The file's number of experts per token, overridden. Ends with the empty entry that llama.cpp looks for.
std::vector<llama_model_kv_override> override_used(const std::string& path, uint32_t n_expert_used) {
    const gguf::GGUFMap file(path);
    const MoeLayout layout = moe_layout(file);
    const std::string key = layout.arch + ".expert_used_count";
    const gguf::Entry* entry = file.metadata().find(key);
    if (entry == nullptr || entry->is_array) {
        throw Error(path + ": n_expert_used can only be set where " + key + " is one number for all layers" +
                    (entry == nullptr ? ", and this model has none" : ", here each layer has its own"));
    }
    uint32_t fewest = layout.n_expert;
    for (const uint32_t layer : layout.moe_layers) fewest = std::min(fewest, layout.experts_in(layer));
    if (n_expert_used > fewest) {
        throw Error(path + ": n_expert_used is " + std::to_string(n_expert_used) + ", but the model has only " +
                    std::to_string(fewest) + " experts" + (fewest < layout.n_expert ? " in some layer" : ""));
    }
    std::vector<llama_model_kv_override> overrides(2);
    overrides[0].tag = LLAMA_KV_OVERRIDE_TYPE_INT;
    overrides[0].val_i64 = n_expert_used;
    if (key.size() >= sizeof(overrides[0].key)) throw Error(path + ": " + key + " is too long a key");
    key.copy(overrides[0].key, key.size());
    return overrides;
}

llama_model_params native(const ModelParams& params) {
    llama_model_params native = llama_model_default_params();
    native.n_gpu_layers = params.n_gpu_layers;
    native.load_mode = params.mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    native.check_tensors = params.check_tensors;
    native.no_alloc = params.simulate;
    if (params.simulate) native.load_mode = LLAMA_LOAD_MODE_NONE;
    native.progress_callback = report_progress;
    native.progress_callback_user_data = const_cast<std::function<bool(float)>*>(&params.progress);
    return native;
}

}  // namespace

struct Model::Impl {
    Impl() = default;
    ~Impl() { llama_model_free(native); }
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    std::string path;
    llama_model* native = nullptr;
    Routing routing;
};

std::shared_ptr<Model> Model::load(const std::string& path, const ModelParams& params) {
    const CheckedFile file = check_file(path);
    const Guard guard;
    const std::shared_ptr<Model> loaded(new Model(file.first_part));
    llama_model_params mapped = native(params);
    const WorkerDevices workers(params, guard, file.first_part);
    workers.use(mapped);
    // The engine maps shared, or not at all.
    if (!file.can_be_mapped) mapped.load_mode = LLAMA_LOAD_MODE_NONE;
    std::vector<llama_model_kv_override> overrides;
    if (params.n_expert_used != 0) {
        overrides = override_used(path, params.n_expert_used);
        mapped.kv_overrides = overrides.data();
    }
    const std::string failed = path + ": could not be loaded";
    loaded->impl_->native =
        guard.run(failed, [&] { return llama_model_load_from_file(file.first_part.c_str(), mapped); });
    if (!loaded->impl_->native) throw guard.error(failed);
    loaded->impl_->routing = hook::routing_of(*loaded->impl_->native);
    return loaded;
}

std::shared_ptr<Model> Model::load(const SegmentList& segments, const std::string& name, const ModelParams& params) {
    for (const auto& source : segments.sources()) check_file(source->path());
    const Guard guard;
    const std::shared_ptr<Model> loaded(new Model(name));
    if (params.n_expert_used != 0) throw Error(name + ": a shard says itself how many experts a token uses");
    llama_model_params streamed = native(params);
    const WorkerDevices workers(params, guard, name);
    workers.use(streamed);
    streamed.load_mode = LLAMA_LOAD_MODE_NONE;
    const auto file = open_stream(segments);
    const std::string failed = name + ": could not be loaded";
    loaded->impl_->native = guard.run(failed, [&] { return llama_model_load_from_file_ptr(file.get(), streamed); });
    segments.check_sources();
    if (!loaded->impl_->native) throw guard.error(failed);
    loaded->impl_->routing = hook::routing_of(*loaded->impl_->native);
    return loaded;
}

Model::Model(std::string path) : impl_(std::make_unique<Impl>()) { impl_->path = std::move(path); }

Model::~Model() = default;

const std::string& Model::path() const { return impl_->path; }
const Routing& Model::routing() const { return impl_->routing; }
llama_model* Model::handle() const { return impl_->native; }

std::string Model::description() const {
    char text[256];
    llama_model_desc(handle(), text, sizeof(text));
    return text;
}

int32_t Model::n_vocab() const { return llama_vocab_n_tokens(llama_model_get_vocab(handle())); }
int32_t Model::n_ctx_train() const { return llama_model_n_ctx_train(handle()); }
uint64_t Model::n_params() const { return llama_model_n_params(handle()); }
uint64_t Model::n_bytes() const { return llama_model_size(handle()); }
bool Model::is_diffusion() const { return llama_model_is_diffusion(handle()); }
bool Model::is_end_of_generation(int32_t token) const {
    return llama_vocab_is_eog(llama_model_get_vocab(handle()), token);
}

std::vector<int32_t> Model::tokenize(std::string_view text, bool special, bool parse) const {
    const Guard guard;
    const llama_vocab* vocab = llama_model_get_vocab(handle());
    const auto length = static_cast<int32_t>(text.size());
    if (text.size() != static_cast<size_t>(length))
        throw Error("text is too long to tokenize in one piece: over 2 GiB");
    std::vector<int32_t> tokens(text.size() + 2);
    const std::string failed = path() + ": the text could not be tokenized";
    const auto fill = [&] {
        const auto room = static_cast<int32_t>(tokens.size());
        return guard.run(
            failed, [&] { return llama_tokenize(vocab, text.data(), length, tokens.data(), room, special, parse); });
    };
    int32_t n = fill();
    if (n < 0) {
        tokens.resize(static_cast<size_t>(-n));
        n = fill();
    }
    if (n < 0) throw guard.error(failed);
    tokens.resize(static_cast<size_t>(n));
    return tokens;
}

std::string Model::piece(int32_t token, bool special) const {
    if (token < 0 || token >= n_vocab()) {
        throw Error("token id " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(n_vocab()));
    }
    std::string text(32, '\0');
    const llama_vocab* vocab = llama_model_get_vocab(handle());
    int32_t n = llama_token_to_piece(vocab, token, text.data(), static_cast<int32_t>(text.size()), 0, special);
    if (n < 0) {
        text.resize(static_cast<size_t>(-n));
        n = llama_token_to_piece(vocab, token, text.data(), -n, 0, special);
    }
    text.resize(static_cast<size_t>(std::max(n, 0)));
    return text;
}

std::string Model::detokenize(const std::vector<int32_t>& tokens, bool special) const {
    std::string text;
    for (const int32_t token : tokens) text += piece(token, special);
    return text;
}

bool Model::has_chat_template() const { return llama_model_chat_template(handle(), nullptr) != nullptr; }

std::string Model::apply_chat_template(const std::vector<std::pair<std::string, std::string>>& messages,
                                       bool add_assistant, const std::string& source) const {
    const char* chat_template = source.empty() ? llama_model_chat_template(handle(), nullptr) : source.c_str();
    if (!chat_template)
        throw Error(path() + ": the model has no chat template; pass one, or prompt it with plain text");
    std::vector<llama_chat_message> chat;
    size_t size = 256;
    for (const auto& [role, content] : messages) {
        chat.push_back({role.c_str(), content.c_str()});
        size += 2 * (role.size() + content.size());
    }
    std::string text(size, '\0');
    for (;;) {
        const int32_t n = llama_chat_apply_template(chat_template, chat.data(), chat.size(), add_assistant, text.data(),
                                                    static_cast<int32_t>(text.size()));
        if (n < 0) {
            throw Error(path() +
                        ": llama.cpp does not know this chat template; pass the name of a known one "
                        "(\"chatml\", \"llama3\", ...) or format the prompt yourself");
        }
        if (static_cast<size_t>(n) <= text.size()) {
            text.resize(static_cast<size_t>(n));
            return text;
        }
        text.resize(static_cast<size_t>(n));
    }
}

}  // namespace moeshard
