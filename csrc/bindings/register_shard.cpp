// Shards: laid out as segments, merged, joined, and what they say about themselves.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"
#include "bindings/text.hpp"
#include "moeshard/quantize.hpp"
#include "moeshard/shard.hpp"

namespace {

using moeshard::Error;
using moeshard::SegmentList;
using moeshard::ShardFacts;
using moeshard::ShardKind;
using moeshard::ShardParams;
using moeshard::gguf::GGUFMap;

using Notes = std::vector<std::pair<std::string, std::string>>;

ShardKind to_kind(const std::string& name) {
    for (const ShardKind kind : {ShardKind::kShard, ShardKind::kTrunk, ShardKind::kExperts}) {
        if (name == moeshard::name(kind)) return kind;
    }
    throw Error("kind must be 'shard', 'trunk' or 'experts', got '" + name + "'");
}

std::vector<SegmentList> shard(const GGUFMap& model, const std::optional<KeepArray>& array, const std::string& kind,
                               uint32_t n_expert_used, bool clamp, bool per_layer, uint64_t max_file_size,
                               bool with_router, Notes notes, std::shared_ptr<GGUFMap> corrected,
                               std::vector<std::string> names) {
    ShardParams params{to_kind(kind),
                       n_expert_used,
                       clamp,
                       per_layer,
                       max_file_size,
                       with_router,
                       std::move(notes),
                       {std::move(corrected), std::move(names)}};
    if (!array && params.kind != ShardKind::kTrunk) throw Error("a shard needs a keep");
    // A trunk is the same for all keeps.
    const uint8_t any = 1;
    const moeshard::Keep keep = array ? *to_keep(array) : moeshard::Keep(1, 1, &any);
    const py::gil_scoped_release nogil;
    return moeshard::shard_segments(model, keep, params);
}

std::vector<SegmentList> merge(const std::vector<std::shared_ptr<GGUFMap>>& shards, uint64_t max_file_size) {
    std::vector<const GGUFMap*> maps;
    for (const auto& shard : shards) maps.push_back(shard.get());
    const py::gil_scoped_release nogil;
    return moeshard::merge_segments(maps, max_file_size);
}

// Of (name, type, shape, bytes) each; the shape in Python's order.
SegmentList tensors(const Notes& entries,
                    const std::vector<std::tuple<std::string, std::string, std::vector<uint64_t>, py::bytes>>& given,
                    const std::filesystem::path& name) {
    std::vector<moeshard::LiteralTensor> literals;
    for (const auto& [tensor, type, shape, bytes] : given) {
        moeshard::LiteralTensor& own = literals.emplace_back();
        if (shape.empty() || shape.size() > own.ne.size()) throw Error(tensor + ": a tensor has 1 to 4 axes");
        own.name = tensor;
        own.type = moeshard::gguf::quantizable_type(type);
        own.n_dims = static_cast<uint32_t>(shape.size());
        std::copy(shape.rbegin(), shape.rend(), own.ne.begin());
        own.bytes = bytes;
    }
    return moeshard::tensor_file(entries, std::move(literals), name.string());
}

py::array_t<bool> keep_of(const ShardFacts& facts) {
    std::vector<uint8_t> keep = facts.keep;
    const auto rows = static_cast<py::ssize_t>(facts.n_layer);
    const auto columns = static_cast<py::ssize_t>(facts.n_expert);
    return take(std::move(keep), {rows, columns}).attr("astype")("bool").cast<py::array_t<bool>>();
}

}  // namespace

void register_shard(py::module_& m) {
    py::class_<ShardFacts>(m, "ShardFacts", "What a shard says about itself.")
        .def_property_readonly(
            "kind", [](const ShardFacts& self) { return moeshard::name(self.kind); }, "'shard', 'trunk' or 'experts'")
        .def_readonly("n_layer", &ShardFacts::n_layer)
        .def_readonly("n_expert", &ShardFacts::n_expert, "of the whole model")
        .def_readonly("layers", &ShardFacts::layers, "layers with experts, ascending")
        .def_property_readonly("keep", &keep_of, "bool (n_layer, n_expert) of the whole model")
        .def_readonly("has_router", &ShardFacts::has_router, "the whole routers are written down")
        .def_readonly("notes", &ShardFacts::notes, "list of (name, text)");

    m.def("shard_segments", &shard, py::arg("model"), py::arg("keep"), py::kw_only(), py::arg("kind") = "shard",
          py::arg("n_expert_used") = 0, py::arg("clamp") = false, py::arg("per_layer") = false,
          py::arg("max_file_size") = 0, py::arg("with_router") = false, py::arg("notes") = Notes(),
          py::arg("corrected") = nullptr, py::arg("corrected_names") = std::vector<std::string>());
    m.def("tensor_file", &tensors, py::arg("entries"), py::arg("tensors"), py::arg("name"));
    m.def("split_entries", &moeshard::split_entries, py::arg("model"));
    m.def("shard_facts", &moeshard::shard_facts, py::arg("file"));
    m.def("merge_segments", &merge, py::arg("shards"), py::kw_only(), py::arg("max_file_size") = 0);
    m.def("join_segments", &moeshard::join_segments, py::arg("trunk"), py::arg("experts"),
          py::call_guard<py::gil_scoped_release>());
    m.def(
        "part_path",
        [](const std::filesystem::path& path, uint64_t index, uint64_t count) {
            return path_to_str(moeshard::part_path(path.string(), index, count));
        },
        py::arg("path"), py::arg("index"), py::arg("count"));
}
