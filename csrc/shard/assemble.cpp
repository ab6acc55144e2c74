#include "shard/assemble.hpp"

#include <cstring>
#include <limits>

namespace moeshard::shard {

namespace {

using gguf::ValueType;

uint64_t padding(uint64_t size, uint64_t alignment) { return (alignment - size % alignment) % alignment; }

uint64_t size_of(const Piece& piece) {
    if (const auto* literal = std::get_if<std::string>(&piece)) return literal->size();
    if (const auto* range = std::get_if<FileRange>(&piece)) return range->range.size;
    const NewTable& table = std::get<NewTable>(piece);
    return table.from.range.size / table.table.n_in * table.table.n_out;
}

void append(SegmentList& list, Piece& piece) {
    if (const auto* literal = std::get_if<std::string>(&piece)) {
        list.append(*literal);
    } else if (const auto* range = std::get_if<FileRange>(&piece)) {
        list.append_range(list.add_source(range->file), range->range.offset, range->range.size);
    } else {
        NewTable& table = std::get<NewTable>(piece);
        const uint64_t rows = table.from.range.size / (table.table.n_in * sizeof(int32_t));
        list.append_expert_ids(list.add_source(table.from.file), table.from.range.offset, rows, std::move(table.table));
    }
}

uint64_t info_size(const NewTensor& tensor) { return 8 + tensor.name.size() + 4 + 8 * tensor.n_dims + 4 + 8; }

std::string info(const NewTensor& tensor, uint64_t offset) {
    std::string bytes = number<uint64_t>(tensor.name.size()) + tensor.name + number(tensor.n_dims);
    for (uint32_t i = 0; i < tensor.n_dims; ++i) bytes += number(tensor.ne[i]);
    return bytes + number(tensor.type) + number(offset);
}

// A run of the model's tensors, and the entries of the file that holds them.
struct Part {
    std::vector<std::vector<Piece>> entries;
    size_t first = 0;
    size_t last = 0;  // one past
};

constexpr uint64_t kCountsBytes = 4 + 4 + 8 + 8;  // magic, version, tensors, entries

uint64_t entries_size(const std::vector<std::vector<Piece>>& entries) {
    uint64_t size = 0;
    for (const auto& entry : entries) {
        for (const Piece& piece : entry) size += size_of(piece);
    }
    return size;
}

SegmentList lay_out(NewFile& file, Part& part) {
    SegmentList list;
    list.append("GGUF" + number(file.version) + number<uint64_t>(part.last - part.first) +
                number<uint64_t>(part.entries.size()));
    for (auto& entry : part.entries) {
        for (Piece& piece : entry) append(list, piece);
    }
    uint64_t offset = 0;
    for (size_t i = part.first; i < part.last; ++i) {
        const NewTensor& tensor = file.tensors[i];
        list.append(info(tensor, offset));
        offset += tensor.nbytes + padding(tensor.nbytes, file.alignment);
    }
    list.append_zeros(padding(list.size(), file.alignment));
    list.end_header();
    for (size_t i = part.first; i < part.last; ++i) {
        for (Piece& piece : file.tensors[i].data) append(list, piece);
        list.append_zeros(padding(list.size(), file.alignment));
    }
    return list;
}

std::vector<Piece> split_entry(const char* key, ValueType type, std::string value) {
    std::vector<Piece> entry;
    entry.emplace_back(scalar_entry(key, type, value));
    return entry;
}

// Deals the tensors out, in order, to as few parts as the limit allows. Where a part begins depends on the size of the
// entries before it, which does not depend on how many parts there are: the counts have a fixed width.
std::vector<Part> divide(const NewFile& file, uint64_t max_file_size, const std::string& name) {
    const auto numbers = [&](size_t no, size_t count) {
        std::vector<std::vector<Piece>> entries;
        entries.push_back(split_entry("split.no", ValueType::kUint16, number(static_cast<uint16_t>(no))));
        entries.push_back(split_entry("split.count", ValueType::kUint16, number(static_cast<uint16_t>(count))));
        entries.push_back(
            split_entry("split.tensors.count", ValueType::kInt32, number(static_cast<int32_t>(file.tensors.size()))));
        return entries;
    };
    std::vector<std::vector<Piece>> aligned;  // other parts carry nothing else of the model's metadata
    if (file.alignment != 32) {
        aligned.push_back(
            split_entry("general.alignment", ValueType::kUint32, number(static_cast<uint32_t>(file.alignment))));
    }
    const uint64_t first_head = kCountsBytes + entries_size(file.entries) + entries_size(numbers(0, 0));
    const uint64_t other_head = kCountsBytes + entries_size(aligned) + entries_size(numbers(0, 0));

    if (file.tensors.empty()) {
        throw Error(name + ": a file of at most " + std::to_string(max_file_size) +
                    " bytes is too small for a header of " + std::to_string(first_head) + " bytes; allow larger files");
    }
    std::vector<Part> parts;
    uint64_t head = 0;
    uint64_t data = 0;
    for (size_t i = 0; i < file.tensors.size(); ++i) {
        const NewTensor& tensor = file.tensors[i];
        const uint64_t tensor_data = tensor.nbytes + padding(tensor.nbytes, file.alignment);
        const auto fits = [&] {
            const uint64_t header = head + info_size(tensor);
            return header + padding(header, file.alignment) + data + tensor_data <= max_file_size;
        };
        if (parts.empty() || !fits()) {
            head = parts.empty() ? first_head : other_head;
            data = 0;
            if (!fits()) {
                throw Error(name + ": a part of at most " + std::to_string(max_file_size) +
                            " bytes is too small for tensor '" + tensor.name + "' of " + std::to_string(tensor.nbytes) +
                            " bytes and a header of " + std::to_string(head + info_size(tensor)) +
                            "; allow larger files");
            }
            parts.push_back({{}, i, i});
        }
        head += info_size(tensor);
        data += tensor_data;
        parts.back().last = i + 1;
    }
    if (parts.size() > std::numeric_limits<uint16_t>::max()) {
        throw Error(name + ": would become " + std::to_string(parts.size()) + " files, GGUF can count up to 65535");
    }
    for (size_t no = 0; no < parts.size(); ++no) {
        parts[no].entries = no == 0 ? file.entries : aligned;
        for (auto& entry : numbers(no, parts.size())) parts[no].entries.push_back(std::move(entry));
    }
    return parts;
}

}  // namespace

std::vector<SegmentList> assemble(NewFile file, uint64_t max_file_size, const std::string& name,
                                  const std::vector<const gguf::GGUFMap*>& models) {
    Part whole{file.entries, 0, file.tensors.size()};
    uint64_t size = kCountsBytes + entries_size(file.entries);
    for (const NewTensor& tensor : file.tensors) size += info_size(tensor);
    size += padding(size, file.alignment);
    for (const NewTensor& tensor : file.tensors) size += tensor.nbytes + padding(tensor.nbytes, file.alignment);

    std::vector<Part> parts{whole};
    if (max_file_size != 0 && size > max_file_size) parts = divide(file, max_file_size, name);
    std::vector<SegmentList> lists;
    for (Part& part : parts) {
        SegmentList& list = lists.emplace_back(lay_out(file, part));
        for (const gguf::GGUFMap* model : models) {
            for (const gguf::Part& source : model->parts()) list.add_source(source.mapping);
        }
    }
    return lists;
}

}  // namespace moeshard::shard
