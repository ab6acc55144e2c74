// The concepts that the native module exposes, one function each.
#pragma once

#include <pybind11/pybind11.h>

void register_batcher(pybind11::module_& m);
void register_context(pybind11::module_& m);
void register_error(pybind11::module_& m);
void register_files(pybind11::module_& m);
void register_generation(pybind11::module_& m);
void register_gguf(pybind11::module_& m);
void register_layout(pybind11::module_& m);
void register_model(pybind11::module_& m);
void register_quantize(pybind11::module_& m);
void register_sampler(pybind11::module_& m);
void register_shard(pybind11::module_& m);
void register_worker(pybind11::module_& m);
