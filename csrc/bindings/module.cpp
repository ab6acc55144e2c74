#include "bindings/register.hpp"
#include "moeshard/process.hpp"

PYBIND11_MODULE(_core, m) {
    m.doc() = "The native core of moeshard.";
    moeshard::take_over_engine_callbacks();
    register_error(m);
    register_layout(m);
    register_gguf(m);
    register_files(m);
    register_quantize(m);
    register_shard(m);
    register_model(m);
    register_context(m);
    register_sampler(m);
    register_generation(m);
    register_batcher(m);
    register_worker(m);
}
