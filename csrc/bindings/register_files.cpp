// Files as lists of segments, and the writer of files.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/interrupt.hpp"
#include "bindings/register.hpp"
#include "bindings/text.hpp"
#include "files/pending_file.hpp"
#include "moeshard/moe_layout.hpp"
#include "moeshard/write.hpp"

namespace {

using moeshard::ByteProgress;
using moeshard::Error;
using moeshard::Segment;
using moeshard::SegmentList;

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

using Paths = std::vector<std::filesystem::path>;

std::vector<std::string> strings(const Paths& paths) { return {paths.begin(), paths.end()}; }

void write_all(const std::vector<std::variant<const SegmentList*, py::bytes>>& files, const Paths& paths, bool force,
               int32_t jobs, const Paths& inputs, const std::optional<py::function>& progress) {
    if (files.size() != paths.size()) {
        throw Error(std::to_string(files.size()) + " files need as many paths, got " + std::to_string(paths.size()));
    }
    std::vector<SegmentList> literal(files.size());
    std::vector<moeshard::Output> outputs;
    for (size_t i = 0; i < files.size(); ++i) {
        const auto* const* list = std::get_if<const SegmentList*>(&files[i]);
        if (list == nullptr) literal[i].append(std::string_view(std::get<py::bytes>(files[i])));
        outputs.push_back({list != nullptr ? *list : &literal[i], paths[i].string()});
    }
    const moeshard::WriteParams params{force, jobs, strings(inputs), to_progress(progress)};
    const py::gil_scoped_release nogil;
    moeshard::write_files(outputs, params);
}

void check_outputs(const Paths& paths, const Paths& inputs, bool force) {
    const py::gil_scoped_release nogil;
    moeshard::check_outputs(strings(paths), strings(inputs), force);
}

// A file that Python writes itself.
class PendingFile {
public:
    PendingFile(const std::filesystem::path& path, bool force) : force_(force) {
        const py::gil_scoped_release nogil;
        file_.emplace(moeshard::files::find_place(path.string(), {}, force), 0);
    }

    int fileno() const { return open().fd(); }

    void publish() {
        moeshard::files::PendingFile& file = open();
        const py::gil_scoped_release nogil;
        file.flush();
        file.publish(force_);
        moeshard::files::flush_folder(moeshard::files::folder_of(file.target()));
        file_.reset();
    }

    void discard() { file_.reset(); }

private:
    moeshard::files::PendingFile& open() const {
        if (!file_) throw Error("the file is closed");
        return *file_;
    }

    mutable std::optional<moeshard::files::PendingFile> file_;
    bool force_;
};

std::optional<uint64_t> difference(const SegmentList& list, const std::filesystem::path& path,
                                   const std::optional<py::function>& progress) {
    const ByteProgress report = to_progress(progress);
    const py::gil_scoped_release nogil;
    return moeshard::first_difference(list, path.string(), report);
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

void register_files(py::module_& m) {
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
                for (const auto& source : self.sources()) paths.append(path_to_str(source->path()));
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

    py::class_<PendingFile>(m, "PendingFile", "A file that appears under its name when it is complete.")
        .def(py::init<const std::filesystem::path&, bool>(), py::arg("path"), py::kw_only(), py::arg("force") = false)
        .def("fileno", &PendingFile::fileno, "Return the descriptor that is written to.")
        .def("publish", &PendingFile::publish, "Flush it to the disk and give it its name.")
        .def("discard", &PendingFile::discard, "Leave nothing of it, unless it was published.");

    m.def("check_outputs", &check_outputs, py::arg("paths"), py::arg("inputs"), py::kw_only(), py::arg("force"));
    m.def("write_segments", &write_all, py::arg("files"), py::arg("paths"), py::kw_only(), py::arg("force") = false,
          py::arg("jobs") = 0, py::arg("inputs") = Paths(), py::arg("progress") = py::none());
    m.def("first_difference", &difference, py::arg("segments"), py::arg("path"), py::kw_only(),
          py::arg("progress") = py::none());
}
