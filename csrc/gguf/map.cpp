#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>

#include "gguf/checked.hpp"
#include "moeshard/gguf.hpp"

namespace moeshard::gguf {

namespace {

// How much of a file that cannot be mapped is read for its header at first, and at most.
constexpr uint64_t kHeadBytes = 1 << 20;
constexpr uint64_t kMostHeadBytes = uint64_t{1} << 30;
constexpr char kSplitNo[] = "split.no";
constexpr char kSplitCount[] = "split.count";
constexpr char kSplitTensors[] = "split.tensors.count";

uint64_t split_value(const Part& part, const char* key, uint64_t fallback) {
    const Entry* entry = part.directory.find(key);
    if (entry == nullptr) return fallback;
    try {
        return entry->as_uint();
    } catch (const Error& error) {
        throw Error(part.path + ": " + error.what());
    }
}

Part open_part(const std::string& path) {
    auto mapping = std::make_shared<const Mapping>(path);
    for (uint64_t size = kHeadBytes;; size *= 8) {
        try {
            Directory directory = parse(mapping->head(size), path, mapping->size());
            return {path, std::move(mapping), std::move(directory)};
        } catch (const Error&) {
            // What was read may end within the header.
            if (mapping->is_mapped() || size >= mapping->size() || size >= kMostHeadBytes) throw;
        }
    }
}

bool same_value(const Entry& a, const Entry& b) {
    return a.type == b.type && a.is_array == b.is_array && a.count == b.count && a.value.size == b.value.size &&
           std::memcmp(a.value.data, b.value.data, a.value.size) == 0;
}

std::string five_digits(uint64_t number) {
    const std::string digits = std::to_string(number);
    return digits.size() < 5 ? std::string(5 - digits.size(), '0') + digits : digits;
}

// Drops the digits that `text` ends in; false if there are fewer than five.
bool drop_digits(std::string_view& text) {
    const size_t last = text.find_last_not_of("0123456789");
    const size_t kept = last == text.npos ? 0 : last + 1;
    const bool enough = text.size() - kept >= 5;
    text.remove_suffix(text.size() - kept);
    return enough;
}

bool drop_suffix(std::string_view& text, std::string_view suffix) {
    if (text.size() < suffix.size() || text.substr(text.size() - suffix.size()) != suffix) return false;
    text.remove_suffix(suffix.size());
    return true;
}

}  // namespace

std::string part_name(const std::string& path, uint64_t index, uint64_t count) {
    const std::string ending = "-of-" + five_digits(count) + ".gguf";
    std::string_view prefix = path;
    if (!drop_suffix(prefix, ending) || !drop_digits(prefix) || !drop_suffix(prefix, "-")) return "";
    return std::string(prefix) + "-" + five_digits(index + 1) + ending;
}

namespace {

int64_t modified(const struct stat& status) {
#ifdef __APPLE__
    const timespec& time = status.st_mtimespec;
#else
    const timespec& time = status.st_mtim;
#endif
    return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

}  // namespace

Mapping::Mapping(const std::string& path) : path_(path) {
    // Without O_NONBLOCK a pipe would be waited for before it can be refused.
    fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd_ < 0) throw Error(path + ": cannot open: " + std::strerror(errno));
    struct stat status {};
    std::string problem;
    if (::fstat(fd_, &status) != 0) {
        problem = std::string("cannot stat: ") + std::strerror(errno);
    } else if (!S_ISREG(status.st_mode)) {
        problem = "is not a regular file";
    } else if (status.st_size == 0) {
        problem = "is empty; a GGUF file begins with 'GGUF'";
    } else {
        size_ = static_cast<uint64_t>(status.st_size);
        const auto size = static_cast<size_t>(size_);
        void* data = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd_, 0);
        is_shared_ = data != MAP_FAILED;
        if (!is_shared_) data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd_, 0);
        if (data != MAP_FAILED) bytes_ = {static_cast<const uint8_t*>(data), size};
        modified_ = modified(status);
        // Compressed files have fewer blocks as well; for these looking for holes only costs a little.
        is_sparse_ = static_cast<uint64_t>(status.st_blocks) * 512 < size_;
    }
    if (!problem.empty()) {
        ::close(fd_);
        throw Error(path + ": " + problem);
    }
}

Mapping::~Mapping() {
    if (is_mapped()) ::munmap(const_cast<uint8_t*>(bytes_.data), bytes_.size);
    ::close(fd_);
}

Bytes Mapping::head(uint64_t size) const { return is_mapped() ? bytes_ : view(0, std::min(size, size_)); }

Bytes Mapping::view(uint64_t offset, uint64_t size) const {
    if (is_mapped()) return {bytes_.data + offset, static_cast<size_t>(size)};
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [begin, bytes] : read_) {
        if (begin <= offset && offset + size <= begin + bytes.size()) {
            return {bytes.data() + (offset - begin), static_cast<size_t>(size)};
        }
    }
    std::vector<uint8_t> bytes(static_cast<size_t>(size));
    read(offset, bytes.data(), size);
    read_.emplace_back(offset, std::move(bytes));  // moving the vectors about leaves their bytes where they are
    return {read_.back().second.data(), static_cast<size_t>(size)};
}

uint64_t Mapping::offset_of(const uint8_t* data) const {
    if (is_mapped()) return static_cast<uint64_t>(data - bytes_.data);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [begin, bytes] : read_) {
        const std::less_equal<const uint8_t*> no_later;
        if (no_later(bytes.data(), data) && no_later(data, bytes.data() + bytes.size())) {
            return begin + static_cast<uint64_t>(data - bytes.data());
        }
    }
    throw Error(path_ + ": what is looked for is not of this file");
}

void Mapping::read(uint64_t offset, uint8_t* out, uint64_t size) const {
    while (size > 0) {
        const ssize_t n = ::pread(fd_, out, static_cast<size_t>(size), static_cast<off_t>(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw Error(path_ + ": cannot read: " + std::strerror(errno));
        if (n == 0) throw Error(path_ + ": became shorter while it was read");
        offset += static_cast<uint64_t>(n);
        out += n;
        size -= static_cast<uint64_t>(n);
    }
}

void Mapping::check_unchanged() const {
    struct stat status {};
    if (::fstat(fd_, &status) != 0) throw Error(path_ + ": cannot stat: " + std::strerror(errno));
    if (static_cast<uint64_t>(status.st_size) != size_ || modified(status) != modified_) {
        throw Error(path_ + ": was changed while it was being read; start again when nothing writes to it");
    }
}

GGUFMap::GGUFMap(const std::string& path) {
    open_parts(path);
    check_parts();
    for (size_t i = 0; i < parts_.size(); ++i) {
        for (Tensor tensor : parts_[i].directory.tensors) {
            tensor.part = static_cast<uint32_t>(i);
            tensors_.push_back(std::move(tensor));
        }
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
        const auto [at, added] = index_.emplace(tensors_[i].name, i);
        if (!added) {
            throw Error("tensor '" + printable(tensors_[i].name) + "' is both in " +
                        parts_[tensors_[at->second].part].path + " and in " + parts_[tensors_[i].part].path +
                        "; these parts are not of one model");
        }
    }
}

void GGUFMap::open_parts(const std::string& path) {
    Part given = open_part(path);
    const uint64_t count = split_value(given, kSplitCount, 1);
    if (count <= 1) {
        parts_.push_back(std::move(given));
        return;
    }
    for (uint64_t i = 0; i < count; ++i) {
        const std::string name = part_name(path, i, count);
        if (name.empty()) {
            throw Error(path + ": is one of " + std::to_string(count) + " parts (" + kSplitCount +
                        "), so its name must end in '-00001-of-" + five_digits(count) +
                        ".gguf' or the number that it has, or the others cannot be found");
        }
        if (name == path) {
            parts_.push_back(std::move(given));
            continue;
        }
        if (::access(name.c_str(), F_OK) != 0) {
            throw Error(name + ": part " + std::to_string(i + 1) + " of " + std::to_string(count) +
                        " is missing; all parts must lie in one directory");
        }
        parts_.push_back(open_part(name));
    }
}

void GGUFMap::check_parts() const {
    if (parts_.size() == 1) return;
    uint64_t n_tensors = 0;
    for (const Part& part : parts_) n_tensors += part.directory.tensors.size();
    const Part& first = parts_.front();
    for (size_t i = 0; i < parts_.size(); ++i) {
        const Part& part = parts_[i];
        if (split_value(part, kSplitNo, UINT64_MAX) != i) {
            throw Error(part.path + ": does not say that it is part " + std::to_string(i) + " (" + kSplitNo +
                        ", counted from 0), as its name does; was it renamed?");
        }
        for (const Entry& entry : part.directory.entries) {
            const Entry* other = first.directory.find(entry.key);
            if (entry.key == kSplitNo || other == nullptr || same_value(entry, *other)) continue;
            throw Error(part.path + ": metadata key '" + printable(entry.key) + "' differs from that of " + first.path +
                        "; these parts are not of one model");
        }
        if (split_value(part, kSplitCount, 0) != parts_.size()) {
            throw Error(part.path + ": has no " + kSplitCount + ", but is opened as one of " +
                        std::to_string(parts_.size()) + " parts");
        }
        const uint64_t claimed = split_value(part, kSplitTensors, n_tensors);
        if (claimed != n_tensors) {
            throw Error(part.path + ": says that the model has " + std::to_string(claimed) + " tensors (" +
                        kSplitTensors + "), but the " + std::to_string(parts_.size()) + " parts hold " +
                        std::to_string(n_tensors) + "; a part is damaged or of another model");
        }
    }
}

const Tensor* GGUFMap::find(std::string_view name) const {
    const auto at = index_.find(name);
    return at == index_.end() ? nullptr : &tensors_[at->second];
}

const Tensor& GGUFMap::tensor(std::string_view name) const {
    const Tensor* tensor = find(name);
    if (tensor == nullptr) throw Error(path() + ": there is no tensor '" + printable(name) + "'");
    return *tensor;
}

Bytes GGUFMap::data(const Tensor& tensor) const {
    return parts_[tensor.part].mapping->view(tensor.offset, tensor.nbytes);
}

}  // namespace moeshard::gguf
