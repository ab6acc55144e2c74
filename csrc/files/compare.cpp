#include <algorithm>
#include <cstring>
#include <vector>

#include "moeshard/write.hpp"

namespace moeshard {

namespace {

constexpr uint64_t kBlockBytes = 4 << 20;

}  // namespace

std::optional<uint64_t> first_difference(const SegmentList& segments, const std::string& path,
                                         const ByteProgress& progress) {
    const gguf::Mapping file(path);
    const uint64_t size = std::min(file.size(), segments.size());
    std::vector<uint8_t> wanted(kBlockBytes);
    std::vector<uint8_t> found(kBlockBytes);
    for (const Segment& segment : segments.segments()) {
        uint64_t offset = segment.offset;
        const uint64_t end = std::min(segment.end(), size);
        while (offset < end) {
            if (progress && !progress(offset, segments.size())) throw Error(path + ": comparing was cancelled");
            const uint64_t n = std::min(kBlockBytes, end - offset);
            segments.read(offset, wanted.data(), n);
            file.read(offset, found.data(), n);
            if (std::memcmp(wanted.data(), found.data(), n) != 0) {
                const auto last = wanted.begin() + static_cast<std::ptrdiff_t>(n);
                const auto differs = std::mismatch(wanted.begin(), last, found.begin()).first;
                return offset + static_cast<uint64_t>(differs - wanted.begin());
            }
            offset += n;
        }
    }
    if (progress) progress(segments.size(), segments.size());
    if (file.size() != segments.size()) return size;
    return std::nullopt;
}

}  // namespace moeshard
