#include <pybind11/stl.h>

#include <memory>
#include <tuple>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"
#include "moeshard/sampler.hpp"

using moeshard::Sampler;
using moeshard::SamplingParams;

namespace {

using Biases = std::vector<std::pair<int32_t, float>>;

SamplingParams make_params(float temperature, int32_t top_k, float top_p, float min_p, float repeat_penalty,
                           int32_t repeat_last_n, float frequency_penalty, float presence_penalty, Biases logit_bias,
                           std::string grammar, std::optional<uint32_t> seed) {
    SamplingParams params;
    params.temperature = temperature;
    params.top_k = top_k;
    params.top_p = top_p;
    params.min_p = min_p;
    params.repeat_penalty = repeat_penalty;
    params.repeat_last_n = repeat_last_n;
    params.frequency_penalty = frequency_penalty;
    params.presence_penalty = presence_penalty;
    params.logit_bias = std::move(logit_bias);
    params.grammar = std::move(grammar);
    if (seed) params.seed = *seed;
    return params;
}

// The arguments of make_params, to be sent to another process.
using Packed = std::tuple<float, int32_t, float, float, float, int32_t, float, float, Biases, std::string,
                          std::optional<uint32_t>>;

Packed pack(const SamplingParams& p) {
    return {
        p.temperature,      p.top_k,      p.top_p,   p.min_p, p.repeat_penalty, p.repeat_last_n, p.frequency_penalty,
        p.presence_penalty, p.logit_bias, p.grammar, p.seed};
}

using Logits = py::array_t<float, py::array::c_style>;

}  // namespace

void register_sampler(py::module_& m) {
    py::class_<SamplingParams>(m, "SamplingParams", "How tokens are drawn.")
        .def(py::init(&make_params), py::kw_only(), py::arg("temperature") = 0.8f, py::arg("top_k") = 40,
             py::arg("top_p") = 0.95f, py::arg("min_p") = 0.05f, py::arg("repeat_penalty") = 1.0f,
             py::arg("repeat_last_n") = 64, py::arg("frequency_penalty") = 0.0f, py::arg("presence_penalty") = 0.0f,
             py::arg("logit_bias") = Biases{}, py::arg("grammar") = "", py::arg("seed") = py::none())
        .def(py::pickle([](const SamplingParams& params) { return py::tuple(py::cast(pack(params))); },
                        [](const py::tuple& packed) { return std::apply(make_params, packed.cast<Packed>()); }));
    py::class_<Sampler>(m, "Sampler", "Draws tokens from logits.")
        .def(py::init([](const std::shared_ptr<moeshard::Model>& model, const SamplingParams& params) {
                 return std::make_unique<Sampler>(*model, params);
             }),
             py::arg("model"), py::arg("params"), py::keep_alive<1, 2>())
        .def(
            "sample",
            [](Sampler& sampler, const Logits& logits) {
                if (logits.ndim() != 1 || logits.size() != sampler.n_vocab()) {
                    throw moeshard::Error("logits must be of shape (" + std::to_string(sampler.n_vocab()) + ",)");
                }
                const py::gil_scoped_release nogil;
                return sampler.sample(logits.data());
            },
            py::arg("logits"))
        .def("accept", &Sampler::accept, py::arg("token"));
}
