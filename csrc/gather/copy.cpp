#include "copy.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace moeshard::gather {

namespace {

constexpr uint64_t kWriteBytes = 8 << 20;  // at once, from a map

[[noreturn]] void fail(const std::string& path, int error) {
    const char* hint = error == ENOSPC || error == EDQUOT ? "; free space on that disk or choose another one" : "";
    throw Error(path + ": cannot write: " + std::strerror(error) + hint);
}

// The kernel copies. False where it cannot between these files: nothing was written then.
bool copy_by_kernel(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path, uint64_t offset,
                    uint64_t size) {
#ifdef __linux__
    auto in = static_cast<off64_t>(from_offset);
    auto out = static_cast<off64_t>(offset);
    const off64_t begin = in;
    while (size > 0) {
        const ssize_t n = ::copy_file_range(from.fd(), &in, fd, &out, static_cast<size_t>(size), 0);
        if (n > 0) {
            size -= static_cast<uint64_t>(n);
        } else if (n == 0) {
            throw Error(from.path() + ": became shorter while it was read");
        } else if (errno != EINTR) {
            const bool impossible = errno == EXDEV || errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP ||
                                    errno == EPERM || errno == ETXTBSY;
            if (impossible && in == begin) return false;
            fail(path, errno);
        }
    }
    return true;
#else
    (void)from, (void)from_offset, (void)fd, (void)path, (void)offset, (void)size;
    return false;
#endif
}

void copy_data(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path, uint64_t offset,
               uint64_t size) {
    if (copy_by_kernel(from, from_offset, fd, path, offset, size)) return;
    // The map is handed to the kernel, never read here: a page that is gone is then an error and no SIGBUS.
    while (size > 0) {
        const size_t wanted = static_cast<size_t>(std::min(size, kWriteBytes));
        const ssize_t n = ::pwrite(fd, from.bytes().data + from_offset, wanted, static_cast<off_t>(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EFAULT) throw Error(from.path() + ": became shorter while it was read");
        if (n < 0) fail(path, errno);
        from_offset += static_cast<uint64_t>(n);
        offset += static_cast<uint64_t>(n);
        size -= static_cast<uint64_t>(n);
    }
}

}  // namespace

void write_at(int fd, const std::string& path, uint64_t offset, const uint8_t* data, uint64_t size) {
    while (size > 0) {
        const ssize_t n = ::pwrite(fd, data, static_cast<size_t>(size), static_cast<off_t>(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail(path, errno);
        data += n;
        offset += static_cast<uint64_t>(n);
        size -= static_cast<uint64_t>(n);
    }
}

gguf::ByteRange next_data(int fd, uint64_t offset, uint64_t end) {
    const off_t data = ::lseek(fd, static_cast<off_t>(offset), SEEK_DATA);
    if (data < 0) {
        // ENXIO: nothing but a hole up to the end. Other errors: no holes are known, all is data.
        return errno == ENXIO ? gguf::ByteRange{end, 0} : gguf::ByteRange{offset, end - offset};
    }
    const uint64_t begin = std::min(static_cast<uint64_t>(data), end);
    const off_t hole = ::lseek(fd, data, SEEK_HOLE);
    const uint64_t stop = hole < 0 ? end : std::min(static_cast<uint64_t>(hole), end);
    return {begin, stop - begin};
}

void copy_range(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path, uint64_t offset,
                uint64_t size) {
    if (!from.is_sparse()) {
        copy_data(from, from_offset, fd, path, offset, size);
        return;
    }
    const uint64_t end = from_offset + size;
    for (uint64_t at = from_offset; at < end;) {
        const gguf::ByteRange data = next_data(from.fd(), at, end);
        copy_data(from, data.offset, fd, path, offset + (data.offset - from_offset), data.size);
        at = data.end();
    }
}

}  // namespace moeshard::gather
