#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"
#include "bindings/text.hpp"
#include "moeshard/model.hpp"
#include "moeshard/process.hpp"

using moeshard::Model;
using moeshard::ModelParams;
using moeshard::Routing;

namespace {

std::shared_ptr<Model> load(const std::filesystem::path& path, const moeshard::SegmentList* segments,
                            int32_t n_gpu_layers, bool mmap, bool check_tensors, uint32_t n_expert_used, bool simulate,
                            std::vector<std::string> rpc, std::vector<uint32_t> layer_split,
                            const std::optional<py::function>& progress) {
    ModelParams params;
    params.n_gpu_layers = n_gpu_layers;
    params.mmap = mmap;
    params.check_tensors = check_tensors;
    params.n_expert_used = n_expert_used;
    params.simulate = simulate;
    params.rpc = std::move(rpc);
    params.layer_split = std::move(layer_split);
    params.progress = [&progress](float fraction) {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) return false;
        if (!progress) return true;
        try {
            // False alone stops: what print or a progress bar returns is no answer.
            return !(*progress)(fraction).is(py::bool_(false));
        } catch (py::error_already_set& error) {
            error.restore();  // llama.cpp would swallow it
            return false;
        }
    };
    const py::gil_scoped_release nogil;
    return segments == nullptr ? Model::load(path.string(), params) : Model::load(*segments, path.string(), params);
}

std::optional<py::bytes> as_bytes(const std::optional<std::string>& text) {
    if (!text) return std::nullopt;
    return py::bytes(*text);
}

}  // namespace

void register_model(py::module_& m) {
    m.def("default_threads", &moeshard::default_threads, py::arg("root") = "",
          "How many threads are used where nobody says: see csrc/files/threads.hpp. `root` is for tests.");
    py::class_<Routing>(m, "Routing", "What of a model decides which keeps fit it.")
        .def_readonly("n_layer", &Routing::n_layer)
        .def_readonly("n_expert", &Routing::n_expert)
        .def_property_readonly("expert_counts",
                               [](const Routing& routing) {
                                   std::vector<int32_t> counts;
                                   for (int32_t layer = 0; layer < routing.n_layer; ++layer) {
                                       counts.push_back(routing.routes(layer) ? routing.experts_in(layer) : 0);
                                   }
                                   return counts;
                               })
        .def_readonly("n_expert_used", &Routing::n_expert_used)
        .def_readonly("n_group", &Routing::n_group)
        .def_readonly("n_group_used", &Routing::n_group_used)
        .def_readonly("weighs_inputs", &Routing::weighs_inputs)
        .def_property_readonly("moe_layers", &Routing::moe_layers)
        .def(py::pickle(
            [](const Routing& r) {
                return py::make_tuple(r.n_layer, r.n_expert, r.expert_counts, r.n_expert_used, r.n_group,
                                      r.n_group_used, r.weighs_inputs);
            },
            [](const py::tuple& packed) {
                using Counts = std::vector<int32_t>;
                return Routing{packed[0].cast<int32_t>(), packed[1].cast<int32_t>(), packed[2].cast<Counts>(),
                               packed[3].cast<Counts>(),  packed[4].cast<int32_t>(), packed[5].cast<int32_t>(),
                               packed[6].cast<bool>()};
            }));

    py::class_<Model, std::shared_ptr<Model>>(m, "Model", "A loaded model.")
        .def(py::init(&load), py::arg("path"), py::arg("segments") = nullptr, py::kw_only(),
             py::arg("n_gpu_layers") = -1, py::arg("mmap") = true, py::arg("check_tensors") = false,
             py::arg("n_expert_used") = 0, py::arg("simulate") = false, py::arg("rpc") = std::vector<std::string>(),
             py::arg("layer_split") = std::vector<uint32_t>(), py::arg("progress") = py::none())
        .def_property_readonly("path", [](const Model& model) { return path_to_str(model.path()); })
        .def_property_readonly("routing", &Model::routing, py::return_value_policy::reference_internal)
        .def_property_readonly("description", &Model::description)
        .def_property_readonly("n_vocab", &Model::n_vocab)
        .def_property_readonly("n_ctx_train", &Model::n_ctx_train)
        .def_property_readonly("n_params", &Model::n_params)
        .def_property_readonly("n_bytes", &Model::n_bytes)
        .def_property_readonly("is_diffusion", &Model::is_diffusion)
        .def_property_readonly("has_chat_template", &Model::has_chat_template)
        .def("is_end_of_generation", &Model::is_end_of_generation, py::arg("token"))
        .def(
            "tokenize",
            [](const Model& model, const Text& text, bool special, bool parse) {
                std::vector<int32_t> tokens;
                {
                    const py::gil_scoped_release nogil;
                    tokens = model.tokenize(text.utf8, special, parse);
                }
                const auto n = static_cast<py::ssize_t>(tokens.size());
                return take(std::move(tokens), {n});
            },
            py::arg("text"), py::arg("special") = true, py::arg("parse") = false)
        .def(
            "detokenize",
            [](const Model& model, const TokenArray& tokens, bool special) {
                return py::bytes(model.detokenize(to_tokens(tokens), special));
            },
            py::arg("tokens"), py::arg("special") = false)
        .def("apply_chat_template", &Model::apply_chat_template, py::arg("messages"), py::arg("add_assistant") = true,
             py::arg("source") = "")
        .def_property_readonly("chat_templates",
                               [](const Model& model) {
                                   py::dict found;  // bytes: a file may hold what is no UTF-8
                                   for (const auto& [name, source] : model.chat_templates()) {
                                       found[py::bytes(name)] = py::bytes(source);
                                   }
                                   return found;
                               })
        .def_static("known_chat_templates", &Model::known_chat_templates)
        .def_property_readonly("control_tokens",
                               [](const Model& model) {
                                   py::dict found;
                                   for (const auto& [token, text] : model.control_tokens()) {
                                       found[py::int_(token)] = py::bytes(text);
                                   }
                                   return found;
                               })
        .def_property_readonly("bos_text", [](const Model& model) { return as_bytes(model.bos_text()); })
        .def_property_readonly("eos_text", [](const Model& model) { return as_bytes(model.eos_text()); })
        .def_property_readonly("adds_bos", &Model::adds_bos);
    py::class_<moeshard::SystemInfo>(m, "SystemInfo", "What the core computes with.")
        .def_readonly("llama_cpp", &moeshard::SystemInfo::llama_cpp)
        .def_readonly("backends", &moeshard::SystemInfo::backends)
        .def_readonly("devices", &moeshard::SystemInfo::devices)
        .def_readonly("features", &moeshard::SystemInfo::features);
    m.def("system_info", &moeshard::system_info);
    m.def(
        "check_keep", [](const KeepArray& keep, const Routing& routing) { to_keep(keep)->check(routing); },
        py::arg("keep"), py::arg("routing"),
        "Raise MoeshardError where the model could not route every token to kept experts only.");
}
