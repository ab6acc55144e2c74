#include <pybind11/stl.h>

#include <memory>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"
#include "bindings/stop_reason.hpp"
#include "moeshard/generation.hpp"

using moeshard::Generation;
using moeshard::GenerationParams;

namespace {

std::unique_ptr<Generation> make(std::shared_ptr<moeshard::Context> context, const TokenArray& prompt,
                                 int32_t max_tokens, const std::optional<moeshard::SamplingParams>& sampling,
                                 std::vector<std::string> stop, bool ignore_end, int32_t seq) {
    GenerationParams params;
    if (sampling) params.sampling = *sampling;
    params.max_tokens = max_tokens;
    params.stop = std::move(stop);
    params.ignore_end = ignore_end;
    return std::make_unique<Generation>(std::move(context), to_tokens(prompt), params, seq);
}

}  // namespace

void register_generation(py::module_& m) {
    py::class_<Generation>(m, "Generation", "One answer, as an iterator of pieces of text (bytes).")
        .def(py::init(&make), py::arg("context"), py::arg("prompt"), py::kw_only(), py::arg("max_tokens") = 128,
             py::arg("sampling") = py::none(), py::arg("stop") = std::vector<std::string>{},
             py::arg("ignore_end") = false, py::arg("seq") = 0)
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
        .def_property_readonly("stop_reason",
                               [](const Generation& generation) { return reason_name(generation.stop_reason()); })
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
