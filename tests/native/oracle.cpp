// Stock llama.cpp with experts dropped through its public eval callback: what moeshard is compared with.
//
//     oracle MODEL --out DIR --seq TOKENS[:KEEP] [--seq ...]
//            [--trace] [--norms] [--watch] [--single] [--ubatch N] [--ctx N] [--threads N]
//
// TOKENS holds int32 ids and KEEP uint8 of shape (n_layer, n_expert). The logits of all tokens are written to
// DIR/logits.f32, one sequence after the other. --trace writes layers.i32, ids.i32, weights.f32 and probs.f32 beside
// them, with the MoE layers outermost, and --norms norms.f32. --watch makes the callback look at all it could change.
// --single computes attention in single precision, which llama.cpp by default rounds to half.

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "eval.h"
#include "ggml-backend.h"
#include "llama-cpp.h"

namespace {

struct options {
    std::string model;
    std::string out;
    std::vector<sequence> sequences;
    bool trace = false;
    bool norms = false;
    bool watch = false;
    bool single = false;
    uint32_t ubatch = 512;
    uint32_t ctx = 0;
    int32_t threads = 2;
};

template <typename T>
std::vector<T> read_file(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!file || bytes.empty()) {
        throw std::runtime_error("cannot read " + path);
    }
    std::vector<T> out(bytes.size() / sizeof(T));
    memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
    return out;
}

sequence read_sequence(const std::string &spec) {
    const size_t colon = spec.find(':');
    sequence one;
    one.tokens = read_file<llama_token>(spec.substr(0, colon));
    if (colon != std::string::npos) {
        one.keep = read_file<uint8_t>(spec.substr(colon + 1));
    }
    return one;
}

options parse(int argc, char **argv) {
    options out;
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        auto value = [&] {
            if (i + 1 == argc) {
                throw std::runtime_error(arg + " needs a value");
            }
            return std::string(argv[++i]);
        };
        if (arg == "--out") {
            out.out = value();
        } else if (arg == "--seq") {
            out.sequences.push_back(read_sequence(value()));
        } else if (arg == "--trace") {
            out.trace = true;
        } else if (arg == "--norms") {
            out.trace = out.norms = true;
        } else if (arg == "--watch") {
            out.watch = true;
        } else if (arg == "--single") {
            out.single = true;
        } else if (arg == "--ubatch") {
            out.ubatch = std::stoul(value());
        } else if (arg == "--ctx") {
            out.ctx = std::stoul(value());
        } else if (arg == "--threads") {
            out.threads = std::stoi(value());
        } else if (out.model.empty() && arg[0] != '-') {
            out.model = arg;
        } else {
            throw std::runtime_error("unknown argument " + arg);
        }
    }
    if (out.model.empty() || out.out.empty() || out.sequences.empty()) {
        throw std::runtime_error("MODEL, --out and --seq are needed");
    }
    return out;
}

struct watcher {
    const gate &dropping;
    recorder &recording;
    bool trace;
    bool watch;

    static bool callback(ggml_tensor *tensor, bool ask, void *self) {
        return static_cast<watcher *>(self)->on(tensor, ask);
    }

    bool on(ggml_tensor *tensor, bool ask) {
        // Each micro-batch begins with the look-up of its tokens' embeddings.
        if (ask && tensor->op == GGML_OP_GET_ROWS && strcmp(tensor->src[0]->name, "token_embd.weight") == 0) {
            recording.begin_ubatch();
        }
        const auto id = parse_name(tensor);
        if (!id) {
            return !ask;
        }
        const bool change = dropping.wants(*id, tensor);
        const bool record = trace && recording.wants(*id);
        if (ask) {
            return change || record || watch;
        }
        if (change) {
            dropping.change(*id, tensor);
        }
        if (record) {
            recording.record(*id, tensor);
        }
        return true;
    }
};

// Which row belongs to which sequence is not to be seen in the callback. With one micro-batch of equally long
// sequences every way in which llama.cpp may split a batch leaves them in order.
void check_order(const options &opt) {
    const size_t length = opt.sequences[0].tokens.size();
    for (const sequence &one : opt.sequences) {
        if (opt.sequences.size() > 1 && (one.tokens.size() != length || length * opt.sequences.size() > opt.ubatch)) {
            throw std::runtime_error("several sequences must be equally long and fit one micro-batch");
        }
    }
}

llama_model_ptr load(const options &opt) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    llama_model_ptr model(llama_model_load_from_file(opt.model.c_str(), params));
    if (!model) {
        throw std::runtime_error("cannot load " + opt.model);
    }
    return model;
}

std::vector<float> decode(llama_context *ctx, const llama_model *model, const options &opt, int32_t n_tokens) {
    llama_batch batch = llama_batch_init(n_tokens, 0, 1);
    for (size_t seq = 0; seq < opt.sequences.size(); seq++) {
        for (size_t pos = 0; pos < opt.sequences[seq].tokens.size(); pos++) {
            const int32_t i = batch.n_tokens++;
            batch.token[i] = opt.sequences[seq].tokens[pos];
            batch.pos[i] = pos;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = seq;
            batch.logits[i] = true;
        }
    }
    const int32_t failed = llama_decode(ctx, batch);
    llama_batch_free(batch);
    if (failed != 0) {
        throw std::runtime_error("llama_decode returned " + std::to_string(failed));
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<float> logits;
    for (int32_t i = 0; i < n_tokens; i++) {
        const float *row = llama_get_logits_ith(ctx, i);
        if (row == nullptr) {
            throw std::runtime_error("no logits: this is not a language model");
        }
        logits.insert(logits.end(), row, row + n_vocab);
    }
    return logits;
}

void run(const options &opt) {
    check_order(opt);
    int32_t n_tokens = 0;
    for (const sequence &one : opt.sequences) {
        n_tokens += one.tokens.size();
    }
    const llama_model_ptr model = load(opt);
    const gate dropping(model.get(), opt.sequences);
    recorder recording(opt.norms);
    watcher watch = {dropping, recording, opt.trace, opt.watch};

    llama_context_params params = llama_context_default_params();
    params.n_ctx = opt.ctx;
    params.n_batch = n_tokens;
    params.n_ubatch = opt.ubatch;
    params.n_seq_max = opt.sequences.size();
    params.n_threads = opt.threads;
    params.n_threads_batch = opt.threads;
    if (opt.single) {
        params.type_k = GGML_TYPE_F32;
        params.type_v = GGML_TYPE_F32;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    if (dropping.active() || opt.trace || opt.watch) {
        params.cb_eval = watcher::callback;
        params.cb_eval_user_data = &watch;
    }
    const llama_context_ptr ctx(llama_init_from_model(model.get(), params));
    if (!ctx) {
        throw std::runtime_error("cannot make a context");
    }
    write_file(opt.out + "/logits.f32", decode(ctx.get(), model.get(), opt, n_tokens));
    if (opt.trace) {
        recording.write(opt.out);
    }
}

}  // namespace

int main(int argc, char **argv) {
    // Its log would drown the message of a failing test; errors still reach stderr.
    llama_log_set(
        [](ggml_log_level level, const char *text, void *) {
            if (level == GGML_LOG_LEVEL_ERROR) {
                fputs(text, stderr);
            }
        },
        nullptr);
    try {
        run(parse(argc, argv));
        return 0;
    } catch (const std::exception &err) {
        fprintf(stderr, "oracle: %s\n", err.what());
        return 1;
    }
}
