// Writes a model made in memory as a GGUF file.
#pragma once

#include "specimens.h"

struct llama_model;

// Writes `meta`'s key-value pairs and the model's tensors. Returns false when the model has no routed experts.
bool write_model(const specimen& what, const gguf_context* meta, const llama_model* model, const char* path);
