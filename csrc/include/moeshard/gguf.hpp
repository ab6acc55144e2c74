// Read-only access to GGUF files.
//
// parse() turns the bytes of one file into a directory: pure, no I/O, every offset checked before a pointer made from
// it is handed out. GGUFMap opens a model of one or several parts, parses each, and hands out views of its tensors.
// Everything throws moeshard::Error with the name of the file and what is wrong in it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "moeshard/error.hpp"

namespace moeshard::gguf {

// The numbers are those of the file format.
enum class ValueType : uint32_t {
    kUint8 = 0,
    kInt8 = 1,
    kUint16 = 2,
    kInt16 = 3,
    kUint32 = 4,
    kInt32 = 5,
    kFloat32 = 6,
    kBool = 7,
    kString = 8,
    kArray = 9,
    kUint64 = 10,
    kInt64 = 11,
    kFloat64 = 12,
};

const char* name(ValueType type);
// Bytes of one value; 0 for strings and arrays, whose length is in the file.
size_t size_of(ValueType type);

// Bytes that somebody else owns.
struct Bytes {
    const uint8_t* data = nullptr;
    size_t size = 0;
};

// Where something lies in its file.
struct ByteRange {
    uint64_t offset = 0;
    uint64_t size = 0;

    uint64_t end() const { return offset + size; }
};

// One key of the metadata. `value` points into the parsed bytes; the accessors throw Error (naming the key) if the
// value is of another type or does not fit.
struct Entry {
    std::string key;
    ValueType type = ValueType::kUint8;  // of the value, or of each element of an array
    bool is_array = false;
    uint64_t count = 1;  // elements; 1 where it is no array
    ByteRange range;     // the whole entry: key, type and value
    Bytes value;         // elements one after the other; each string with its length before it

    uint64_t as_uint() const;  // any integer type that is not negative, or bool
    int64_t as_int() const;    // any integer type, or bool
    double as_float() const;   // float32 or float64
    bool as_bool() const;
    std::string_view as_string() const;
    // A scalar counts as an array of one. Strings are data and may not be UTF-8; see parse().
    std::vector<uint64_t> as_uints() const;
    std::vector<std::string_view> as_strings() const;
};

struct Tensor {
    std::string name;
    uint32_t type = 0;                       // a ggml_type
    uint32_t n_dims = 0;                     // as the file says; the rest of ne is 1
    std::array<uint64_t, 4> ne{1, 1, 1, 1};  // ggml's order: ne[0] runs fastest
    uint64_t row_bytes = 0;                  // of ne[0] elements
    uint64_t nbytes = 0;
    uint64_t offset = 0;  // from the start of its file
    uint32_t part = 0;    // which file
    ByteRange info;       // its entry in the directory of that file

    const char* type_name() const;
    std::string shape() const;  // "[64, 32, 16]", ggml's order, for messages
};

// What the header of one file says. Valid as long as the bytes it was parsed from.
struct Directory {
    uint32_t version = 0;
    uint64_t alignment = 32;
    ByteRange metadata;        // all entries, without the counts before them
    ByteRange infos;           // the tensor directory
    uint64_t data_offset = 0;  // where tensor data begins
    std::vector<Entry> entries;
    std::vector<Tensor> tensors;

    const Entry* find(std::string_view key) const;
};

// Keys and names of tensors must be UTF-8. Values need not be: vocabularies hold tokens that are pieces of characters,
// and llama.cpp takes whatever other programs wrote. `name` stands for the file in messages. `file_size`: of the whole
// file, where `bytes` is only its beginning, at least up to the data.
Directory parse(Bytes bytes, const std::string& name, uint64_t file_size = 0);

// The name of part `index` (from 0) of `count`, for a name that ends in "-00002-of-00005.gguf"; "" for other names or
// another count.
std::string part_name(const std::string& path, uint64_t index, uint64_t count);

// A file open for reading. None of it is mapped before somebody wants to look at it.
class Mapping : public std::enable_shared_from_this<Mapping> {
public:
    explicit Mapping(const std::string& path);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    const std::string& path() const { return path_; }
    uint64_t size() const { return size_; }
    int fd() const { return fd_; }  // stays open: copying by the kernel needs it
    bool is_sparse() const { return is_sparse_; }
    // Whether the file can be mapped as the engine does it, shared with all who look at it. Some mounts (FUSE with
    // direct I/O, 9p) refuse that.
    bool is_shareable() const;

    // Bytes of the file for as long as the pointer lives, which may be longer than this: mapped, or where neither the
    // file nor a part of it can be, read into memory. A file that is cut short while it is mapped ends the process that
    // looks at what is gone; read() does not.
    std::shared_ptr<const uint8_t> view(uint64_t offset, uint64_t size) const;
    // Throws Error where the bytes are not there any more.
    void read(uint64_t offset, uint8_t* out, uint64_t size) const;
    // Throws Error where the file was changed since it was opened.
    void check_unchanged() const;

private:
    const uint8_t* whole() const;

    std::string path_;
    int fd_ = -1;
    uint64_t size_ = 0;
    bool is_sparse_ = false;
    int64_t modified_ = 0;  // nanoseconds
    mutable std::once_flag looked_at_;
    mutable const uint8_t* whole_ = nullptr;  // the map of all of it, where there is one
};

struct Part {
    std::string path;
    std::shared_ptr<const Mapping> mapping;
    std::shared_ptr<const std::vector<uint8_t>> header;  // the beginning of the file; what `directory` refers to
    Directory directory;
};

class GGUFMap {
public:
    // Any part of a multi-part model finds all of them.
    explicit GGUFMap(const std::string& path);
    GGUFMap(GGUFMap&&) = default;
    GGUFMap(const GGUFMap&) = delete;
    GGUFMap& operator=(const GGUFMap&) = delete;

    const std::string& path() const { return parts_.front().path; }
    const std::vector<Part>& parts() const { return parts_; }
    // The metadata of the model: that of the first part.
    const Directory& metadata() const { return parts_.front().directory; }
    // Of all parts, in file order.
    const std::vector<Tensor>& tensors() const { return tensors_; }
    const Tensor* find(std::string_view name) const;
    const Tensor& tensor(std::string_view name) const;  // Error if there is none

    // See Mapping::view(); of a slice of the tensor: `size` bytes from byte `from` of it on.
    std::shared_ptr<const uint8_t> data(const Tensor& tensor, uint64_t from, uint64_t size) const;
    std::shared_ptr<const uint8_t> data(const Tensor& tensor) const { return data(tensor, 0, tensor.nbytes); }
    // The file that the tensor lies in.
    std::shared_ptr<const Mapping> owner(const Tensor& tensor) const { return parts_[tensor.part].mapping; }

private:
    void open_parts(const std::string& path);
    void check_parts() const;

    std::vector<Part> parts_;
    std::vector<Tensor> tensors_;
    std::unordered_map<std::string_view, size_t> index_;  // name -> tensors_, whose strings it refers to
};

}  // namespace moeshard::gguf
