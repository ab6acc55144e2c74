#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "ggml.h"
#include "gguf/beginning.hpp"
#include "gguf/checked.hpp"
#include "moeshard/gguf.hpp"

namespace moeshard::gguf {

namespace {

constexpr uint32_t kNewestVersion = 3;
// Length, one character, type, one byte of value; and length, one character, dimensions, type, offset.
constexpr uint64_t kSmallestEntry = 8 + 1 + 4 + 1;
constexpr uint64_t kSmallestInfo = 8 + 1 + 4 + 4 + 8;

std::string quoted(std::string_view text) { return "'" + printable(text) + "'"; }

// Reads forward through the header; every read is checked against what is left of the file.
class Reader {
public:
    // `bytes` are the beginning of a file of `file_size`, or all of it.
    Reader(Bytes bytes, const std::string& name, uint64_t file_size)
        : bytes_(bytes), name_(name), file_size_(file_size) {}

    uint64_t tell() const { return at_; }
    uint64_t left() const { return file_size_ - at_; }

    [[noreturn]] void fail(const std::string& what) const { throw Error(name_ + ": " + what); }

    Bytes take(uint64_t size, const std::string& what) {
        if (size > left()) {
            fail("the file ends inside " + what + ": " + std::to_string(size) + " bytes needed at offset " +
                 std::to_string(at_) + ", " + std::to_string(left()) +
                 " left; it is truncated or damaged, download or convert it again");
        }
        if (size > bytes_.size - at_) throw HeaderGoesOn{at_ + size};
        const Bytes taken{bytes_.data + at_, static_cast<size_t>(size)};
        at_ += size;
        return taken;
    }

    template <typename T>
    T number(const std::string& what) {
        T value;
        std::memcpy(&value, take(sizeof(T), what).data, sizeof(T));
        return value;
    }

    std::string_view text(const std::string& what) {
        const auto length = number<uint64_t>("the length of " + what);
        const Bytes bytes = take(length, what);
        return {reinterpret_cast<const char*>(bytes.data), bytes.size};
    }

    // A key or a tensor's name. llama.cpp handles them as C strings, in which a zero byte hides what follows.
    std::string identifier(const std::string& what) {
        const std::string_view value = text(what);
        if (!is_utf8(value)) fail(what + " is not valid UTF-8 (" + quoted(value) + ")");
        if (value.empty()) fail(what + " is empty");
        if (value.find('\0') != value.npos) fail(what + " contains a zero byte (" + quoted(value) + ")");
        return std::string(value);
    }

private:
    Bytes bytes_;
    const std::string& name_;
    uint64_t file_size_;
    uint64_t at_ = 0;
};

void read_version(Reader& reader, Directory& directory) {
    const Bytes magic = reader.take(4, "the magic");
    if (std::memcmp(magic.data, "GGUF", 4) != 0) {
        reader.fail("not a GGUF file: it begins with " +
                    quoted({reinterpret_cast<const char*>(magic.data), magic.size}) + " instead of 'GGUF'");
    }
    directory.version = reader.number<uint32_t>("the version");
    // A file of the other byte order has its small version number in the upper half.
    if (directory.version != 0 && (directory.version & 0xffff) == 0) {
        reader.fail("written for the other byte order (big-endian or little-endian); convert it for this machine");
    }
    if (directory.version < 2 || directory.version > kNewestVersion) {
        reader.fail("GGUF version " + std::to_string(directory.version) +
                    " is not supported, only 2 and 3; convert the model with a current llama.cpp");
    }
}

Entry read_entry(Reader& reader, uint64_t number) {
    Entry entry;
    entry.range.offset = reader.tell();
    entry.key = reader.identifier("key " + std::to_string(number));
    const std::string what = "the value of key " + quoted(entry.key);

    auto type = reader.number<uint32_t>("the type of key " + quoted(entry.key));
    entry.is_array = type == static_cast<uint32_t>(ValueType::kArray);
    if (entry.is_array) {
        type = reader.number<uint32_t>("the element type of key " + quoted(entry.key));
        entry.count = reader.number<uint64_t>("the length of key " + quoted(entry.key));
    }
    if (type > static_cast<uint32_t>(ValueType::kFloat64) || type == static_cast<uint32_t>(ValueType::kArray)) {
        reader.fail("key " + quoted(entry.key) + " has " + (entry.is_array ? "elements of " : "") +
                    "unknown or unsupported type " + std::to_string(type));
    }
    entry.type = static_cast<ValueType>(type);

    const uint64_t smallest = entry.type == ValueType::kString ? 8 : size_of(entry.type);
    if (entry.count > reader.left() / smallest) {
        reader.fail("key " + quoted(entry.key) + " claims " + std::to_string(entry.count) + " values, but only " +
                    std::to_string(reader.left()) + " bytes of the file are left");
    }
    const uint64_t begin = reader.tell();
    if (entry.type == ValueType::kString) {
        const Bytes rest = reader.take(0, what);
        for (uint64_t i = 0; i < entry.count; ++i) reader.text(what);
        entry.value = {rest.data, static_cast<size_t>(reader.tell() - begin)};
    } else {
        entry.value = reader.take(entry.count * smallest, what);
    }
    entry.range.size = reader.tell() - entry.range.offset;
    return entry;
}

void read_metadata(Reader& reader, uint64_t n_entries, Directory& directory) {
    directory.metadata.offset = reader.tell();
    std::unordered_set<std::string> seen;
    for (uint64_t i = 0; i < n_entries; ++i) {
        Entry entry = read_entry(reader, i);
        if (!seen.insert(entry.key).second) reader.fail("key " + quoted(entry.key) + " appears twice");
        directory.entries.push_back(std::move(entry));
    }
    directory.metadata.size = reader.tell() - directory.metadata.offset;

    const Entry* alignment = directory.find("general.alignment");
    if (alignment == nullptr) return;
    if (alignment->is_array || alignment->type != ValueType::kUint32) {
        reader.fail("general.alignment must be a uint32");
    }
    directory.alignment = alignment->as_uint();
    if (!is_power_of_two(directory.alignment)) {
        reader.fail("general.alignment is " + std::to_string(directory.alignment) + ", which is no power of two");
    }
}

// The size of a row and of the whole, from the type's block size in ggml.
void measure(const Reader& reader, Tensor& tensor) {
    const std::string what = "tensor " + quoted(tensor.name) + " " + tensor.shape();
    const auto type = static_cast<ggml_type>(tensor.type);
    if (tensor.type >= GGML_TYPE_COUNT || ggml_blck_size(type) == 0) {
        reader.fail(what + " has ggml type " + std::to_string(tensor.type) +
                    ", which the llama.cpp of this build does not know or no longer supports; update moeshard or "
                    "quantise the model again");
    }
    const auto block = static_cast<uint64_t>(ggml_blck_size(type));
    if (tensor.ne[0] % block != 0) {
        reader.fail(what + " has rows of " + std::to_string(tensor.ne[0]) + " elements, which is no multiple of the " +
                    std::to_string(block) + " elements of a block of " + tensor.type_name());
    }
    // ggml counts elements in an int64, so their number is checked apart from the bytes.
    uint64_t elements = 1;
    bool fits = true;
    for (const uint64_t n : tensor.ne) fits = fits && multiply(elements, n, elements) && elements <= INT64_MAX;
    fits = fits && multiply(tensor.ne[0] / block, ggml_type_size(type), tensor.row_bytes) &&
           multiply(elements / block, ggml_type_size(type), tensor.nbytes) && tensor.nbytes <= INT64_MAX;
    if (!fits) reader.fail(what + " is larger than any file can be");
}

Tensor read_info(Reader& reader, uint64_t number) {
    Tensor tensor;
    tensor.info.offset = reader.tell();
    tensor.name = reader.identifier("the name of tensor " + std::to_string(number));
    const std::string what = "tensor " + quoted(tensor.name);
    if (tensor.name.size() >= GGML_MAX_NAME) {
        reader.fail(what + " has a name longer than the " + std::to_string(GGML_MAX_NAME - 1) +
                    " bytes that llama.cpp allows");
    }
    tensor.n_dims = reader.number<uint32_t>("the dimensions of " + what);
    if (tensor.n_dims > tensor.ne.size()) {
        reader.fail(what + " has " + std::to_string(tensor.n_dims) + " dimensions, at most 4 are possible");
    }
    for (uint32_t i = 0; i < tensor.n_dims; ++i) tensor.ne[i] = reader.number<uint64_t>("the shape of " + what);
    tensor.type = reader.number<uint32_t>("the type of " + what);
    tensor.offset = reader.number<uint64_t>("the offset of " + what);  // within the data, until place() moves it
    tensor.info.size = reader.tell() - tensor.info.offset;
    measure(reader, tensor);
    return tensor;
}

// Turns offsets within the data section into offsets within the file.
void place(const Reader& reader, uint64_t file_size, const Directory& directory, Tensor& tensor) {
    const std::string what = "the data of tensor " + quoted(tensor.name);
    if (tensor.offset % directory.alignment != 0) {
        reader.fail(what + " lies at offset " + std::to_string(tensor.offset) + ", which is not aligned to " +
                    std::to_string(directory.alignment) + " bytes");
    }
    uint64_t begin = 0;
    uint64_t end = 0;
    if (!add(directory.data_offset, tensor.offset, begin) || !add(begin, tensor.nbytes, end) || end > file_size) {
        reader.fail(what + " (" + std::to_string(tensor.nbytes) + " bytes at offset " + std::to_string(tensor.offset) +
                    " of the data section) reaches past the end of the file (" + std::to_string(file_size) +
                    " bytes); it is truncated or damaged, download or convert it again");
    }
    tensor.offset = begin;
}

void check_overlaps(const Reader& reader, const std::vector<Tensor>& tensors) {
    std::vector<const Tensor*> order;
    for (const Tensor& tensor : tensors) {
        if (tensor.nbytes > 0) order.push_back(&tensor);
    }
    std::sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < order.size(); ++i) {
        if (order[i]->offset - order[i - 1]->offset < order[i - 1]->nbytes) {
            reader.fail("the data of tensors " + quoted(order[i - 1]->name) + " and " + quoted(order[i]->name) +
                        " overlap");
        }
    }
}

void read_tensors(Reader& reader, uint64_t file_size, uint64_t n_tensors, Directory& directory) {
    directory.infos.offset = reader.tell();
    std::unordered_set<std::string> seen;
    for (uint64_t i = 0; i < n_tensors; ++i) {
        Tensor tensor = read_info(reader, i);
        if (!seen.insert(tensor.name).second) reader.fail("tensor " + quoted(tensor.name) + " appears twice");
        directory.tensors.push_back(std::move(tensor));
    }
    directory.infos.size = reader.tell() - directory.infos.offset;

    if (!align_up(reader.tell(), directory.alignment, directory.data_offset) ||
        (n_tensors > 0 && directory.data_offset > file_size)) {
        reader.fail("the file ends before its data section (alignment " + std::to_string(directory.alignment) +
                    "); it is truncated or damaged, download or convert it again");
    }
    for (Tensor& tensor : directory.tensors) place(reader, file_size, directory, tensor);
    check_overlaps(reader, directory.tensors);
}

}  // namespace

Directory parse(Bytes bytes, const std::string& name, uint64_t file_size) {
    try {
        return parse_beginning(bytes, name, std::max<uint64_t>(file_size, bytes.size));
    } catch (const HeaderGoesOn&) {
        throw Error(name + ": its header is longer than the " + std::to_string(bytes.size) + " bytes given of it");
    }
}

Directory parse_beginning(Bytes bytes, const std::string& name, uint64_t file_size) {
    Reader reader(bytes, name, file_size);
    Directory directory;
    read_version(reader, directory);
    const auto n_tensors = reader.number<uint64_t>("the number of tensors");
    const auto n_entries = reader.number<uint64_t>("the number of keys");
    // Refused before anything is counted up to them.
    if (n_entries > reader.left() / kSmallestEntry) {
        reader.fail("claims " + std::to_string(n_entries) + " keys, more than fit into the file");
    }
    if (n_tensors > reader.left() / kSmallestInfo) {
        reader.fail("claims " + std::to_string(n_tensors) + " tensors, more than fit into the file");
    }
    read_metadata(reader, n_entries, directory);
    read_tensors(reader, file_size, n_tensors, directory);
    return directory;
}

const Entry* Directory::find(std::string_view key) const {
    for (const Entry& entry : entries) {
        if (entry.key == key) return &entry;
    }
    return nullptr;
}

}  // namespace moeshard::gguf
