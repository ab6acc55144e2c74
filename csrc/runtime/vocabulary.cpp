// What of a model's vocabulary and metadata chat templates need.
#include <string_view>

#include "llama.h"
#include "moeshard/model.hpp"
#include "runtime/guard.hpp"

namespace moeshard {

namespace {

constexpr std::string_view kTemplate = "tokenizer.chat_template";

// What llama_model_meta_*_by_index writes, however long it is.
template <typename Read>
std::string read_whole(const Read& read) {
    std::string text(static_cast<size_t>(read(nullptr, 0)), '\0');
    read(text.data(), text.size() + 1);
    return text;
}

}  // namespace

std::map<std::string, std::string> Model::chat_templates() const {
    std::map<std::string, std::string> found;
    const llama_model* model = handle();
    for (int32_t i = 0; i < llama_model_meta_count(model); ++i) {
        const std::string key =
            read_whole([&](char* text, size_t size) { return llama_model_meta_key_by_index(model, i, text, size); });
        if (key.compare(0, kTemplate.size(), kTemplate) != 0) continue;
        if (key.size() > kTemplate.size() && key[kTemplate.size()] != '.') continue;
        const std::string name = key.size() > kTemplate.size() ? key.substr(kTemplate.size() + 1) : "";
        found[name] = read_whole(
            [&](char* text, size_t size) { return llama_model_meta_val_str_by_index(model, i, text, size); });
    }
    // llama.cpp knows one for some models that have none.
    if (const char* own = llama_model_chat_template(model, nullptr)) found.emplace("", own);
    return found;
}

std::vector<std::string> Model::known_chat_templates() {
    std::vector<const char*> names(static_cast<size_t>(llama_chat_builtin_templates(nullptr, 0)));
    llama_chat_builtin_templates(names.data(), names.size());
    return {names.begin(), names.end()};
}

std::map<int32_t, std::string> Model::control_tokens() const {
    std::map<int32_t, std::string> found;
    const llama_vocab* vocab = llama_model_get_vocab(handle());
    for (int32_t token = 0; token < n_vocab(); ++token) {
        if ((llama_vocab_get_attr(vocab, token) & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN)) == 0) continue;
        found[token] = llama_vocab_get_text(vocab, token);
    }
    return found;
}

std::optional<std::string> Model::bos_text() const {
    const llama_vocab* vocab = llama_model_get_vocab(handle());
    const int32_t token = llama_vocab_bos(vocab);
    if (token < 0) return std::nullopt;
    return llama_vocab_get_text(vocab, token);
}

std::optional<std::string> Model::eos_text() const {
    const llama_vocab* vocab = llama_model_get_vocab(handle());
    const int32_t token = llama_vocab_eos(vocab);
    if (token < 0) return std::nullopt;
    return llama_vocab_get_text(vocab, token);
}

bool Model::adds_bos() const { return llama_vocab_get_add_bos(llama_model_get_vocab(handle())); }

}  // namespace moeshard
