// GGUFMap: the metadata and the tensors of a GGUF file.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>

#include "bindings/mapping.hpp"
#include "bindings/register.hpp"
#include "bindings/text.hpp"
#include "ggml.h"
#include "moeshard/gguf.hpp"
#include "moeshard/moe_layout.hpp"

namespace py = pybind11;

namespace {

using moeshard::ExpertTensor;
using moeshard::MoeLayout;
using moeshard::gguf::ByteRange;
using moeshard::gguf::Bytes;
using moeshard::gguf::Entry;
using moeshard::gguf::GGUFMap;
using moeshard::gguf::Part;
using moeshard::gguf::Tensor;
using moeshard::gguf::ValueType;

// The two mappings of a GGUFMap; each reads when it is asked, and keeps the map alive.
struct Metadata {
    std::shared_ptr<GGUFMap> map;
};
struct Tensors {
    std::shared_ptr<GGUFMap> map;
};

py::dtype dtype_of(ValueType type) {
    switch (type) {
        case ValueType::kUint8:
            return py::dtype::of<uint8_t>();
        case ValueType::kInt8:
            return py::dtype::of<int8_t>();
        case ValueType::kUint16:
            return py::dtype::of<uint16_t>();
        case ValueType::kInt16:
            return py::dtype::of<int16_t>();
        case ValueType::kUint32:
            return py::dtype::of<uint32_t>();
        case ValueType::kInt32:
            return py::dtype::of<int32_t>();
        case ValueType::kFloat32:
            return py::dtype::of<float>();
        case ValueType::kBool:
            return py::dtype::of<bool>();
        case ValueType::kUint64:
            return py::dtype::of<uint64_t>();
        case ValueType::kInt64:
            return py::dtype::of<int64_t>();
        default:
            return py::dtype::of<double>();
    }
}

py::object to_python(const Entry& entry) {
    if (entry.type == ValueType::kString) {
        if (!entry.is_array) return to_str(entry.as_string());
        py::list strings;
        for (const std::string_view text : entry.as_strings()) strings.append(to_str(text));
        return strings;
    }
    // Copied: values lie unaligned in the file. A bool is any byte there.
    if (entry.is_array) {
        py::array array(dtype_of(entry.type), std::vector<uint64_t>{entry.count});
        auto* out = static_cast<uint8_t*>(array.mutable_data());
        std::copy_n(entry.value.data, entry.value.size, out);
        if (entry.type == ValueType::kBool) {
            for (size_t i = 0; i < entry.value.size; ++i) out[i] = out[i] != 0 ? 1 : 0;
        }
        return std::move(array);
    }
    switch (entry.type) {
        case ValueType::kBool:
            return py::bool_(entry.as_bool());
        case ValueType::kFloat32:
        case ValueType::kFloat64:
            return py::float_(entry.as_float());
        case ValueType::kUint64:
            return py::int_(entry.as_uint());
        default:
            return py::int_(entry.as_int());
    }
}

// What numpy can compute with keeps its type; all else (quantised blocks, bf16) is bytes.
py::dtype dtype_of(const Tensor& tensor) {
    switch (static_cast<ggml_type>(tensor.type)) {
        case GGML_TYPE_F32:
            return py::dtype::of<float>();
        case GGML_TYPE_F16:
            return py::dtype("float16");
        case GGML_TYPE_F64:
            return py::dtype::of<double>();
        case GGML_TYPE_I8:
            return py::dtype::of<int8_t>();
        case GGML_TYPE_I16:
            return py::dtype::of<int16_t>();
        case GGML_TYPE_I32:
            return py::dtype::of<int32_t>();
        case GGML_TYPE_I64:
            return py::dtype::of<int64_t>();
        default:
            return py::dtype::of<uint8_t>();
    }
}

// Python's order: outermost axis first.
std::vector<uint64_t> shape_of(const Tensor& tensor) {
    return std::vector<uint64_t>(tensor.ne.rend() - tensor.n_dims, tensor.ne.rend());
}

// Of the tensor, or of a slice of it: where it lies in the tensor, one index on the outermost axis.
py::array view(const GGUFMap& map, const Tensor& tensor, std::optional<ByteRange> slice = std::nullopt) {
    const py::dtype dtype = dtype_of(tensor);
    std::vector<uint64_t> shape = shape_of(tensor);
    const auto item = static_cast<uint64_t>(dtype.itemsize());
    if (shape.empty() && tensor.row_bytes != item) shape.push_back(tensor.row_bytes);
    if (!shape.empty()) shape.back() = tensor.row_bytes / item;
    const ByteRange range = slice.value_or(ByteRange{0, tensor.nbytes});
    if (slice && shape.size() > 1) {
        shape.erase(shape.begin());
    } else if (slice) {
        shape = range.size == item ? std::vector<uint64_t>() : std::vector<uint64_t>{range.size / item};
    }

    using Owner = std::shared_ptr<const uint8_t>;
    auto owner = std::make_unique<Owner>(map.data(tensor, range.offset, range.size));
    const uint8_t* data = owner->get();
    const py::capsule keep_alive(owner.get(), [](void* held) { delete static_cast<Owner*>(held); });
    owner.release();
    py::array array(dtype, shape, data, keep_alive);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

// One slice of an expert tensor. The layout is looked up once per file and kept with it.
py::object expert_view(const py::object& self, uint32_t layer, const std::string& name, uint64_t expert) {
    if (!py::hasattr(self, "_layout")) self.attr("_layout") = self.attr("moe_layout")();
    const auto& map = py::cast<const GGUFMap&>(self);
    const auto& layout = py::cast<const MoeLayout&>(self.attr("_layout"));
    const std::string block = "blk." + std::to_string(layer) + ".";
    std::string choices;
    for (const ExpertTensor& facts : layout.tensors) {
        const Tensor& tensor = map.tensors()[facts.tensor];
        if (facts.layer != layer || facts.axis < 0) continue;
        const std::string rest = tensor.name.substr(block.size());
        choices += (choices.empty() ? "" : ", ") + rest;
        if (name != rest && name + ".weight" != rest && name != tensor.name) continue;
        if (expert >= facts.count) {
            throw moeshard::Error(tensor.name + " has no expert " + std::to_string(expert) + ": it has " +
                                  std::to_string(facts.count) + ", numbered from 0");
        }
        // Of a model with one expert the axis may have been left out.
        if (static_cast<uint32_t>(facts.axis) >= tensor.n_dims) return view(map, tensor);
        const ByteRange range{expert * facts.slice_bytes, facts.slice_bytes};
        return view(map, tensor, range).attr("__getitem__")(py::tuple());  // a number where it is one
    }
    throw moeshard::Error(map.path() + ": layer " + std::to_string(layer) + " has no expert tensor '" + name + "'; " +
                          (choices.empty() ? "it has no experts" : "it has " + choices));
}

py::tuple range_of(const ByteRange& range) { return py::make_tuple(range.offset, range.size); }

void register_mappings(py::module_& m) {
    bind_mapping<Metadata>(
        m, "GGUFMetadata",
        [](const Metadata& self) {
            py::list keys;
            for (const Entry& entry : self.map->metadata().entries) keys.append(to_str(entry.key));
            return keys;
        },
        [](const Metadata& self, const std::string& key) { return self.map->metadata().find(key); },
        [](const Metadata&, const Entry& entry) { return to_python(entry); });
    bind_mapping<Tensors>(
        m, "GGUFTensors",
        [](const Tensors& self) {
            py::list keys;
            for (const Tensor& tensor : self.map->tensors()) keys.append(to_str(tensor.name));
            return keys;
        },
        [](const Tensors& self, const std::string& name) { return self.map->find(name); },
        [](const Tensors& self, const Tensor& tensor) { return view(*self.map, tensor); });
}

py::bytes read_part(const Part& part, uint64_t offset, uint64_t size) {
    const uint64_t end = part.mapping->size();
    if (offset > end || size > end - offset) {
        throw moeshard::Error(part.path + ": a read of " + std::to_string(size) + " bytes at " +
                              std::to_string(offset) + " reaches past the end of the file, " + std::to_string(end) +
                              " bytes");
    }
    std::string bytes(size, '\0');
    {
        const py::gil_scoped_release nogil;
        part.mapping->read(offset, reinterpret_cast<uint8_t*>(bytes.data()), size);
    }
    return bytes;
}

void register_infos(py::module_& m) {
    py::class_<Tensor>(m, "TensorInfo", "What the directory of a GGUF says about a tensor.")
        .def_readonly("name", &Tensor::name)
        .def_property_readonly("type", &Tensor::type_name, "as ggml calls it, e.g. 'q8_0'")
        .def_property_readonly(
            "shape", [](const Tensor& tensor) { return py::tuple(py::cast(shape_of(tensor))); },
            "in elements, outermost axis first")
        .def_readonly("nbytes", &Tensor::nbytes)
        .def_readonly("row_bytes", &Tensor::row_bytes)
        .def_readonly("offset", &Tensor::offset, "in its file")
        .def_readonly("part", &Tensor::part)
        .def("__repr__", [](const Tensor& tensor) {
            return "<TensorInfo " + tensor.name + " " + tensor.shape() + " " + tensor.type_name() + ">";
        });
    py::class_<Part>(m, "GGUFPart", "One file of a model.")
        .def_property_readonly("path", [](const Part& part) { return path_to_str(part.path); })
        .def_property_readonly("size", [](const Part& part) { return part.mapping->size(); })
        .def_property_readonly("version", [](const Part& part) { return part.directory.version; })
        .def_property_readonly("alignment", [](const Part& part) { return part.directory.alignment; })
        .def_property_readonly("data_offset", [](const Part& part) { return part.directory.data_offset; })
        .def("read", &read_part, py::arg("offset"), py::arg("size"),
             "Return bytes of the file that was opened, whatever has its name by now; read, not looked at in the map.")
        .def_property_readonly(
            "metadata_range", [](const Part& part) { return range_of(part.directory.metadata); },
            "(offset, size) of all metadata entries")
        .def_property_readonly(
            "entry_ranges",
            [](const Part& part) {
                py::dict ranges;
                for (const Entry& entry : part.directory.entries) ranges[to_str(entry.key)] = range_of(entry.range);
                return ranges;
            },
            "key -> (offset, size) of its entry");
}

}  // namespace

void register_gguf(py::module_& m) {
    register_infos(m);
    register_mappings(m);
    py::class_<GGUFMap, std::shared_ptr<GGUFMap>>(m, "GGUFMap", py::dynamic_attr(),
                                                  R"(A GGUF file, or all parts of one, mapped for reading.

Nothing is read but the header until a tensor is looked at. Views stay valid without the map.)")
        .def(py::init([](const std::filesystem::path& path) {
                 const py::gil_scoped_release release;
                 return std::make_shared<GGUFMap>(path.string());
             }),
             py::arg("path"))
        .def_property_readonly("path", [](const GGUFMap& self) { return path_to_str(self.path()); })
        .def_property_readonly("parts", &GGUFMap::parts, py::return_value_policy::reference_internal)
        .def_property_readonly(
            "metadata", [](std::shared_ptr<GGUFMap> self) { return Metadata{std::move(self)}; },
            "mapping: key -> value; arrays of numbers are numpy arrays, arrays of strings are lists")
        .def_property_readonly(
            "tensors", [](std::shared_ptr<GGUFMap> self) { return Tensors{std::move(self)}; },
            "mapping: name -> read-only array on the file, outermost axis first; float and integer "
            "types as such, all others as uint8 of shape (..., row_bytes)")
        .def_property_readonly("tensor_infos", &GGUFMap::tensors, py::return_value_policy::reference_internal)
        .def(
            "moe_layout", [](const GGUFMap& self) { return moeshard::moe_layout(self); },
            "Which tensors depend on the experts, and how; MoeshardError where that cannot be decided.")
        .def("expert", &expert_view, py::arg("layer"), py::arg("tensor"), py::arg("expert"),
             "One expert's slice of a tensor, a view on the file as in `tensors`; `tensor` is its name without "
             "'blk.N.', '.weight' may be left out. MoeshardError where there is none.");
}
