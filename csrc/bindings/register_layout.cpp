// MoeLayout: how the tensors of a model depend on its experts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings/register.hpp"
#include "moeshard/moe_layout.hpp"

namespace py = pybind11;

using moeshard::ExpertTensor;
using moeshard::MoeLayout;

namespace {

const char* role_name(const ExpertTensor& tensor) { return moeshard::name(tensor.role); }

}  // namespace

void register_layout(py::module_& m) {
    py::class_<ExpertTensor>(m, "ExpertTensor", "A tensor that depends on the experts; see MoeLayout.tensors.")
        .def_readonly("index", &ExpertTensor::tensor, "its place in GGUFMap.tensor_infos")
        .def_readonly("layer", &ExpertTensor::layer)
        .def_property_readonly("role", &role_name,
                               "what the axis of experts means: 'slab' (an expert's weights), 'per_expert' (its bias, "
                               "scale or input scale), 'router' (its row), 'router_value' (its bias in the selection), "
                               "'chunk_slab' (shared by neighbours); 'expert_ids': no axis, the values are experts")
        .def_readonly("axis", &ExpertTensor::axis, "the axis of experts in ggml's order, -1 if the values are ids")
        .def_readonly("count", &ExpertTensor::count, "length of that axis")
        .def_readonly("slice_bytes", &ExpertTensor::slice_bytes, "bytes of one index on that axis");
    py::class_<MoeLayout>(m, "MoeLayout",
                          "How the tensors of a model depend on its experts; made by GGUFMap.moe_layout().")
        .def_readonly("arch", &MoeLayout::arch)
        .def_readonly("n_layer", &MoeLayout::n_layer)
        .def_readonly("n_layer_nextn", &MoeLayout::n_layer_nextn)
        .def_readonly("n_expert", &MoeLayout::n_expert, "0 for a dense model")
        .def_property_readonly(
            "expert_counts",
            [](const MoeLayout& layout) {
                std::vector<uint32_t> counts(layout.n_layer);
                for (const uint32_t layer : layout.moe_layers) counts[layer] = layout.experts_in(layer);
                return counts;
            },
            "per layer, 0 where nothing is routed; n_expert but in a shard whose layers hold different numbers")
        .def_readonly("n_expert_used", &MoeLayout::n_expert_used, "per layer, 0 where nothing is routed")
        .def_readonly("n_expert_groups", &MoeLayout::n_expert_groups)
        .def_readonly("n_expert_groups_used", &MoeLayout::n_expert_groups_used)
        .def_readonly("experts_per_chunk", &MoeLayout::experts_per_chunk)
        .def_property_readonly("gating", [](const MoeLayout& layout) { return moeshard::name(layout.gating); })
        .def_property_readonly("selection", [](const MoeLayout& layout) { return moeshard::name(layout.selection); })
        .def_readonly("renormalized", &MoeLayout::renormalized)
        .def_readonly("moe_layers", &MoeLayout::moe_layers)
        .def_readonly("hash_layers", &MoeLayout::hash_layers)
        .def_readonly("tensors", &MoeLayout::tensors)
        .def_readonly("trunk_bytes", &MoeLayout::trunk_bytes)
        .def_readonly("expert_bytes", &MoeLayout::expert_bytes)
        .def_readonly("per_expert_bytes", &MoeLayout::per_expert_bytes, "per layer: of one expert");
}
