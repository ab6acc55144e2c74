// Shards as lists of segments, and the writer of files.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "interrupt.hpp"
#include "moeshard/shard.hpp"
#include "moeshard/write.hpp"
#include "register.hpp"

namespace {

using moeshard::ByteProgress;
using moeshard::Error;
using moeshard::Segment;
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

const char* name_of(Segment::Kind kind) {
    switch (kind) {
        case Segment::Kind::kLiteral:
            return "literal";
        case Segment::Kind::kRange:
            return "range";
        case Segment::Kind::kZeros:
            return "zeros";
        case Segment::Kind::kExpertIds:
            return "expert_ids";
    }
    return "";
}

// Ctrl-C ends the work even where nobody asks for progress.
ByteProgress to_progress(const std::optional<py::function>& callback) {
    return [&callback](uint64_t done, uint64_t total) {
        if (python_signal_pending()) return false;
        if (!callback) return true;
        const py::gil_scoped_acquire gil;
        try {
            (*callback)(done, total);
            return true;
        } catch (py::error_already_set& error) {
            error.restore();
            return false;
        }
    };
}

std::vector<SegmentList> shard(const GGUFMap& model, const std::optional<KeepArray>& array, const std::string& kind,
                               uint32_t n_expert_used, bool clamp, bool per_layer, uint64_t max_file_size,
                               Notes notes) {
    ShardParams params{to_kind(kind), n_expert_used, clamp, per_layer, max_file_size, std::move(notes)};
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

void write_all(const std::vector<const SegmentList*>& lists, const std::vector<std::filesystem::path>& paths,
               bool force, int32_t jobs, const std::optional<py::function>& progress) {
    if (lists.size() != paths.size()) {
        throw Error(std::to_string(lists.size()) + " files need as many paths, got " + std::to_string(paths.size()));
    }
    std::vector<moeshard::Output> outputs;
    for (size_t i = 0; i < lists.size(); ++i) outputs.push_back({lists[i], paths[i].string()});
    const moeshard::WriteParams params{force, jobs, to_progress(progress)};
    const py::gil_scoped_release nogil;
    moeshard::write_files(outputs, params);
}

std::optional<uint64_t> difference(const SegmentList& list, const std::filesystem::path& path,
                                   const std::optional<py::function>& progress) {
    const ByteProgress report = to_progress(progress);
    const py::gil_scoped_release nogil;
    return moeshard::first_difference(list, path.string(), report);
}

py::array_t<bool> keep_of(const ShardFacts& facts) {
    std::vector<uint8_t> keep = facts.keep;
    const auto rows = static_cast<py::ssize_t>(facts.n_layer);
    const auto columns = static_cast<py::ssize_t>(facts.n_expert);
    return take(std::move(keep), {rows, columns}).attr("astype")("bool").cast<py::array_t<bool>>();
}

py::bytes read_bytes(const SegmentList& list, uint64_t offset, uint64_t size) {
    // Before memory is taken for it.
    if (offset > list.size() || size > list.size() - offset) list.read(offset, nullptr, size);
    std::string bytes(size, '\0');
    {
        const py::gil_scoped_release nogil;
        list.read(offset, reinterpret_cast<uint8_t*>(bytes.data()), size);
    }
    return bytes;
}

SegmentList with_bytes(const SegmentList& list, const std::vector<std::pair<uint64_t, py::bytes>>& replacements) {
    SegmentList out = list;
    for (const auto& [offset, bytes] : replacements) out = out.with_bytes(offset, std::string_view(bytes));
    return out;
}

// What the header says, and the bytes that it was read from.
struct Header {
    explicit Header(const SegmentList& list) : bytes(list.header_size()), name(list.sources().front()->path()) {
        list.read(0, bytes.data(), bytes.size());
        directory = moeshard::gguf::parse({bytes.data(), bytes.size()}, name, list.size());
    }

    std::vector<uint8_t> bytes;
    std::string name;
    moeshard::gguf::Directory directory;
};

moeshard::MoeLayout layout_of(const SegmentList& list) {
    const Header header(list);
    return moeshard::moe_layout(header.directory, header.directory.tensors, header.name);
}

std::optional<std::pair<uint64_t, uint64_t>> entry_range(const SegmentList& list, const std::string& key) {
    const Header header(list);
    const auto* entry = header.directory.find(key);
    if (entry == nullptr) return std::nullopt;
    return std::pair(entry->range.offset, entry->range.size);
}

}  // namespace

void register_gather(py::module_& m) {
    py::class_<SegmentList>(m, "SegmentList", "A file as literal bytes, ranges of other files and zeros.")
        .def_property_readonly("size", &SegmentList::size, "bytes of the file")
        .def_property_readonly("header_size", &SegmentList::header_size, "bytes before the data of tensors")
        .def_property_readonly(
            "segments",
            [](const SegmentList& self) {
                py::list rows;
                for (const Segment& s : self.segments()) {
                    rows.append(py::make_tuple(name_of(s.kind), s.offset, s.size, s.source, s.from));
                }
                return rows;
            },
            "list of (kind, offset, size, source, from); kind is 'literal', 'range', 'zeros' or 'expert_ids'")
        .def_property_readonly(
            "sources",
            [](const SegmentList& self) {
                py::list paths;
                for (const auto& source : self.sources()) {
                    paths.append(py::reinterpret_steal<py::str>(PyUnicode_DecodeFSDefault(source->path().c_str())));
                }
                return paths;
            },
            "paths of the files that ranges are read from")
        .def("read", &read_bytes, py::arg("offset"), py::arg("size"),
             "Return bytes of the file that the segments make.")
        .def("with_bytes", &with_bytes, py::arg("replacements"),
             "Return the same file with other bytes, each (offset, bytes).")
        .def_property_readonly(
            "tensor_infos", [](const SegmentList& list) { return Header(list).directory.tensors; },
            "list of TensorInfo, in the order of the file")
        .def("entry_range", &entry_range, py::arg("key"),
             "Return (offset, size) of a metadata entry; None where there is none.")
        .def("moe_layout", &layout_of, "How the tensors of the file depend on its experts.");

    py::class_<ShardFacts>(m, "ShardFacts", "What a shard says about itself.")
        .def_property_readonly(
            "kind", [](const ShardFacts& self) { return moeshard::name(self.kind); }, "'shard', 'trunk' or 'experts'")
        .def_readonly("n_layer", &ShardFacts::n_layer)
        .def_readonly("n_expert", &ShardFacts::n_expert, "of the whole model")
        .def_readonly("layers", &ShardFacts::layers, "layers with experts, ascending")
        .def_property_readonly("keep", &keep_of, "bool (n_layer, n_expert) of the whole model")
        .def_readonly("notes", &ShardFacts::notes, "list of (name, text)");

    m.def("shard_segments", &shard, py::arg("model"), py::arg("keep"), py::kw_only(), py::arg("kind") = "shard",
          py::arg("n_expert_used") = 0, py::arg("clamp") = false, py::arg("per_layer") = false,
          py::arg("max_file_size") = 0, py::arg("notes") = Notes());
    m.def("shard_facts", &moeshard::shard_facts, py::arg("file"));
    m.def("merge_segments", &merge, py::arg("shards"), py::kw_only(), py::arg("max_file_size") = 0);
    m.def("join_segments", &moeshard::join_segments, py::arg("trunk"), py::arg("experts"),
          py::call_guard<py::gil_scoped_release>());
    m.def("part_path", &moeshard::part_path, py::arg("path"), py::arg("index"), py::arg("count"));
    m.def("write_segments", &write_all, py::arg("files"), py::arg("paths"), py::kw_only(), py::arg("force") = false,
          py::arg("jobs") = 0, py::arg("progress") = py::none());
    m.def("first_difference", &difference, py::arg("segments"), py::arg("path"), py::kw_only(),
          py::arg("progress") = py::none());
}
