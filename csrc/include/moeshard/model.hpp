// A loaded model: its weights, tokenizer and routing facts. Contexts compute with it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moeshard/keep.hpp"
#include "moeshard/segments.hpp"

struct llama_model;

namespace moeshard {

struct ModelParams {
    int32_t n_gpu_layers = -1;   // layers on the GPU where there is one; negative: all
    bool mmap = true;            // map the file instead of reading it into memory
    bool check_tensors = false;  // look for NaN and infinite values while loading
    // Experts per token instead of what the file says, in every layer that routes; 0: as the file says. Only for files
    // with one number for all layers.
    uint32_t n_expert_used = 0;
    // Reads the header only and allocates nothing, to ask a Context how much memory it would take. Computes nothing.
    bool simulate = false;
    // Workers ("host:port", see worker.hpp) that hold all layers, in this order, instead of this machine. llama.cpp
    // ends the process when it loses one: compute in a process that may end.
    std::vector<std::string> rpc;
    // How many layers each worker holds; of a model with n layers they add up to n. Empty: by the memory they say to
    // have.
    std::vector<uint32_t> layer_split;
    // Called with the fraction loaded; returning false stops the load, which then throws Error.
    std::function<bool(float)> progress;
};

// Immutable, so it may be shared between threads; destroyed with the last Context that uses it.
class Model : public std::enable_shared_from_this<Model> {
public:
    // `path` names a GGUF file or the first part (-00001-of-0000N.gguf) of one. Throws Error.
    static std::shared_ptr<Model> load(const std::string& path, const ModelParams& params = {});
    // A model that is no file: what `segments` say is read into memory, and nothing else of their sources. `name`
    // stands for the model in messages and is its path().
    static std::shared_ptr<Model> load(const SegmentList& segments, const std::string& name,
                                       const ModelParams& params = {});
    ~Model();
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    const std::string& path() const;
    const Routing& routing() const;
    std::string description() const;  // e.g. "qwen3moe 30B.A3B Q4_K - Medium"
    int32_t n_vocab() const;
    int32_t n_ctx_train() const;
    uint64_t n_params() const;
    uint64_t n_bytes() const;   // of all tensors
    bool is_diffusion() const;  // its attention is not causal: a sequence must be computed in one piece
    bool is_end_of_generation(int32_t token) const;

    // `special` adds the model's own begin/end tokens; `parse` reads "<|...|>" in the text as control tokens.
    std::vector<int32_t> tokenize(std::string_view text, bool special = true, bool parse = false) const;
    // Bytes of the tokens; not necessarily valid UTF-8 where a character is cut. Throws Error on an unknown id.
    std::string detokenize(const std::vector<int32_t>& tokens, bool special = false) const;
    std::string piece(int32_t token, bool special = false) const;

    bool has_chat_template() const;
    // Messages are (role, content). `source` replaces the model's own template. Throws Error where there is none or the
    // engine does not know it (it recognises the common ones and does not interpret Jinja).
    std::string apply_chat_template(const std::vector<std::pair<std::string, std::string>>& messages,
                                    bool add_assistant = true, const std::string& source = "") const;

    // What a chat template is chosen from and rendered with. The model's own templates in Jinja, by name, "" being the
    // one to use; and the names of those that the engine knows by itself, which apply_chat_template takes too.
    std::map<std::string, std::string> chat_templates() const;
    static std::vector<std::string> known_chat_templates();
    // Tokens that `parse` reads in a text and that no text is made of otherwise, with how they are written.
    std::map<int32_t, std::string> control_tokens() const;
    // How the tokens that begin and end a text are written, where there are such.
    std::optional<std::string> bos_text() const;
    std::optional<std::string> eos_text() const;
    bool adds_bos() const;  // whether `special` puts the one that begins a text before it

    llama_model* handle() const;

private:
    struct Impl;
    explicit Model(std::string path);

    std::unique_ptr<Impl> impl_;
};

// What this library computes with.
struct SystemInfo {
    std::string llama_cpp;              // the pin that it was built from
    std::vector<std::string> backends;  // e.g. "CPU", "RPC"
    std::vector<std::string> devices;   // e.g. "CPU: AMD EPYC 7713"
    std::vector<std::string> features;  // instruction sets and options that were compiled in
};

SystemInfo system_info();

}  // namespace moeshard
