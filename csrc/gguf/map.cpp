#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "gguf/beginning.hpp"
#include "gguf/checked.hpp"
#include "moeshard/gguf.hpp"

namespace moeshard::gguf {

namespace {

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

// Reads the header and no more, in steps: how long it is, only itself can say.
Part open_part(const std::string& path) {
    constexpr uint64_t kStepBytes = 1 << 20;
    constexpr uint64_t kLargest = uint64_t{1} << 30;
    auto mapping = std::make_shared<const Mapping>(path);
    uint64_t size = std::min(kStepBytes, mapping->size());
    for (;;) {
        auto header = std::make_shared<std::vector<uint8_t>>(static_cast<size_t>(size));
        mapping->read(0, header->data(), size);
        try {
            Directory directory = parse_beginning({header->data(), header->size()}, path, mapping->size());
            return {path, std::move(mapping), std::move(header), std::move(directory)};
        } catch (const HeaderGoesOn& more) {
            if (more.needed > kLargest) {
                throw Error(path +
                            ": its header would be longer than 1 GiB; it is damaged, download or convert it again");
            }
            size = std::min(std::max(more.needed, std::min(4 * size, kLargest)), mapping->size());
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

std::shared_ptr<const uint8_t> GGUFMap::data(const Tensor& tensor, uint64_t from, uint64_t size) const {
    return parts_[tensor.part].mapping->view(tensor.offset + from, size);
}

}  // namespace moeshard::gguf
