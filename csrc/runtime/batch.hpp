// llama.cpp's batch, filled token by token.
#pragma once

#include <cstdint>

#include "llama.h"

namespace moeshard {

struct Batch {
    explicit Batch(int32_t capacity) : native(llama_batch_init(capacity, 0, 1)) {}
    ~Batch() { llama_batch_free(native); }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    void add(int32_t token, int32_t pos, int32_t seq, bool output) {
        const int32_t i = native.n_tokens++;
        native.token[i] = token;
        native.pos[i] = pos;
        native.n_seq_id[i] = 1;
        native.seq_id[i][0] = seq;
        native.logits[i] = output;
    }

    llama_batch native;
};

}  // namespace moeshard
