// Makes a tiny random model of an MoE architecture.
//
//     zoo --list                       names, one a line
//     zoo NAME OUT.gguf [--seed N] [--experts TYPE]
//
// TYPE is that of the expert tensors, as ggml calls it ("q4_K"). Exit code 3: the architecture routes to no experts.

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-cpp.h"
#include "llama-model-saver.h"
#include "specimens.h"
#include "write_model.h"

namespace {

// The fixture's 0.1 for everything leaves all experts nearly tied, and what they add to the residual stream too small
// to be seen in the logits of some architectures. This spreads the router's scores by about 1.5.
constexpr float kRouterStdev = 1.0f;
constexpr float kExpertStdev = 0.3f;
// Three of these multiply what an expert gives, where an architecture reads them.
constexpr float kExpertScaleStdev = 1.0f;

float embedding_stdev;  // of the specimen that is made

float tensor_stdev(const char* name, float stdev) {
    if (strcmp(name, "token_embd.weight") == 0) {
        return embedding_stdev;
    }
    if (strstr(name, "ffn_gate_inp.weight")) {
        return kRouterStdev;
    }
    if (strstr(name, "_exps.scale")) {
        return kExpertScaleStdev;
    }
    return is_expert_tensor(name) ? kExpertStdev : stdev;
}

// The one integer tensor: the experts of each token in a hash-routed layer, distinct within a token.
void fill_integers(ggml_tensor* tensor, std::mt19937& gen) {
    GGML_ASSERT(tensor->type == GGML_TYPE_I32 && strstr(tensor->name, "tid2eid") != nullptr);
    std::vector<int32_t> ids(kExperts);
    std::iota(ids.begin(), ids.end(), 0);
    for (int64_t token = 0; token < tensor->ne[1]; token++) {
        std::shuffle(ids.begin(), ids.end(), gen);
        ggml_backend_tensor_set(tensor, ids.data(), token * tensor->nb[1], tensor->ne[0] * sizeof(int32_t));
    }
}

}  // namespace

#include "stock-fixture.h"

static int make(const specimen& what, const char* path, size_t seed) {
    gguf_context_ptr meta = get_gguf_ctx(what.arch, /*moe=*/true);
    if (what.adjust) {
        what.adjust(meta.get(), LLM_KV(what.arch));
    }
    embedding_stdev = what.embedding_stdev;
    tensor_data_params data = {seed, 0.1f};
    llama_model_params params = llama_model_default_params();
    ggml_backend_dev_t none[] = {nullptr};
    params.devices = none;
    llama_model_ptr model(llama_model_init_from_user(meta.get(), set_tensor_data, &data, params));
    if (!model) {
        fprintf(stderr, "zoo: llama.cpp refuses the metadata of %s\n", what.name.c_str());
        return 1;
    }
    return write_model(what, meta.get(), model.get(), path) ? 0 : 3;
}

static ggml_type type_called(const std::string& name) {
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        if (name == ggml_type_name(ggml_type(type))) {
            return ggml_type(type);
        }
    }
    throw std::runtime_error("ggml has no type " + name);
}

int main(int argc, char** argv) {
    std::vector<specimen> specimens = all_specimens();
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (const specimen& one : specimens) {
            puts(one.name.c_str());
        }
        return 0;
    }
    size_t seed = 1;
    std::string experts;
    bool usable = argc >= 3 && argc % 2 == 1;
    for (int i = 3; usable && i < argc; i += 2) {
        if (strcmp(argv[i], "--seed") == 0) {
            seed = std::stoull(argv[i + 1]);
        } else if (strcmp(argv[i], "--experts") == 0) {
            experts = argv[i + 1];
        } else {
            usable = false;
        }
    }
    if (!usable) {
        fprintf(stderr, "usage: zoo --list | zoo NAME OUT.gguf [--seed N] [--experts TYPE]\n");
        return 2;
    }
    for (specimen& one : specimens) {
        if (one.name == argv[1]) {
            try {
                if (!experts.empty()) {
                    one.experts = type_called(experts);
                }
                return make(one, argv[2], seed);
            } catch (const std::exception& err) {
                fprintf(stderr, "zoo: %s: %s\n", argv[1], err.what());
                return 1;
            }
        }
    }
    fprintf(stderr, "zoo: no specimen is called %s\n", argv[1]);
    return 2;
}
