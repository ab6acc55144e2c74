#include <pybind11/stl.h>

#include <memory>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"
#include "moeshard/generation.hpp"

using moeshard::Generation;
using moeshard::GenerationParams;
using moeshard::StopReason;

namespace {

std::unique_ptr<Generation> make(std::shared_ptr<moeshard::Context> context, const TokenArray& prompt,
                                 int32_t max_tokens, float temperature, int32_t top_k, float top_p, float min_p,
                                 float repeat_penalty, int32_t repeat_last_n, std::optional<uint32_t> seed,
                                 std::vector<std::string> stop, bool ignore_end, int32_t seq) {
    GenerationParams params;
    params.sampling.temperature = temperature;
    params.sampling.top_k = top_k;
    params.sampling.top_p = top_p;
    params.sampling.min_p = min_p;
    params.sampling.repeat_penalty = repeat_penalty;
    params.sampling.repeat_last_n = repeat_last_n;
    if (seed) params.sampling.seed = *seed;
    params.max_tokens = max_tokens;
    params.stop = std::move(stop);
    params.ignore_end = ignore_end;
    return std::make_unique<Generation>(std::move(context), to_tokens(prompt), params, seq);
}

const char* reason_name(const Generation& generation) {
    switch (generation.stop_reason()) {
        case StopReason::kRunning:
            return "running";
        case StopReason::kEnd:
            return "end";
        case StopReason::kStop:
            return "stop";
        case StopReason::kLength:
            return "length";
        case StopReason::kContext:
            return "context";
    }
    return "running";
}

}  // namespace

void register_generation(py::module_& m) {
    py::class_<Generation>(m, "Generation", "One answer, as an iterator of pieces of text (bytes).")
        .def(py::init(&make), py::arg("context"), py::arg("prompt"), py::kw_only(), py::arg("max_tokens") = 128,
             py::arg("temperature") = 0.8f, py::arg("top_k") = 40, py::arg("top_p") = 0.95f, py::arg("min_p") = 0.05f,
             py::arg("repeat_penalty") = 1.0f, py::arg("repeat_last_n") = 64, py::arg("seed") = py::none(),
             py::arg("stop") = std::vector<std::string>{}, py::arg("ignore_end") = false, py::arg("seq") = 0)
        .def("__iter__", [](py::object self) { return self; })
        .def("__next__",
             [](Generation& generation) {
                 std::optional<std::string> piece;
                 {
                     const py::gil_scoped_release nogil;
                     piece = generation.next();
                 }
                 if (!piece) throw py::stop_iteration();
                 return py::bytes(*piece);
             })
        .def_property_readonly("stop_reason", &reason_name)
        .def_property_readonly("prompt_tokens",
                               [](const Generation& g) {
                                   auto copy = g.prompt();
                                   const auto n = static_cast<py::ssize_t>(copy.size());
                                   return take(std::move(copy), {n});
                               })
        .def_property_readonly("tokens",
                               [](const Generation& g) {
                                   auto copy = g.tokens();
                                   const auto n = static_cast<py::ssize_t>(copy.size());
                                   return take(std::move(copy), {n});
                               })
        .def_property_readonly("prompt_seconds", &Generation::prompt_seconds)
        .def_property_readonly("generation_seconds", &Generation::generation_seconds);
}
