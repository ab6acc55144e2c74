#include "files/copy.hpp"

#include <fcntl.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/vfs.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "files/place.hpp"
#include "moeshard/error.hpp"

namespace moeshard::files {

namespace {

// Larger writes ask the page cache for such large pieces of memory that it spends its time finding them.
constexpr uint64_t kPieceBytes = 256 << 10;
// The smallest blocks that file systems share.
constexpr uint64_t kBlockBytes = 4096;

// Begins to bring what was just written to the disk, which is then done while more is copied and not when all is.
void start_flush(int fd, uint64_t offset, uint64_t size) {
#ifdef __linux__
    ::sync_file_range(fd, static_cast<off64_t>(offset), static_cast<off64_t>(size), SYNC_FILE_RANGE_WRITE);
#else
    (void)fd, (void)offset, (void)size;
#endif
}

// File systems that copy without moving the bytes through this machine.
bool copies_elsewhere(int fd) {
#ifdef __linux__
    constexpr uint32_t kRemote[] = {0x6969 /* NFS */, 0xfe534d42 /* SMB2 */, 0xff534d42 /* CIFS */,
                                    0xc36400 /* Ceph */};
    struct statfs status {};
    if (::fstatfs(fd, &status) != 0) return false;
    return std::find(std::begin(kRemote), std::end(kRemote), static_cast<uint32_t>(status.f_type)) != std::end(kRemote);
#else
    (void)fd;
    return false;
#endif
}

// Where the next data of the file begins, at or after `offset`, and where it ends; `end` twice if there is none before.
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

bool is_zero(const uint8_t* data, uint64_t size) { return data[0] == 0 && std::memcmp(data, data + 1, size - 1) == 0; }

// The kernel copies, or shares extents. Returns how many bytes it did: fewer than asked for where it cannot, or says
// that it cannot. Network file systems and FUSE fail here with all kinds of errors, or copy nothing, of files that can
// be read and written well; what is really wrong shows when the rest is.
uint64_t copy_by_kernel(const gguf::Mapping& from, uint64_t from_offset, int fd, uint64_t offset, uint64_t size) {
#ifdef __linux__
    auto in = static_cast<off64_t>(from_offset);
    auto out = static_cast<off64_t>(offset);
    uint64_t done = 0;
    while (done < size) {
        const ssize_t n = ::copy_file_range(from.fd(), &in, fd, &out, static_cast<size_t>(size - done), 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        done += static_cast<uint64_t>(n);
        start_flush(fd, static_cast<uint64_t>(out - n), static_cast<uint64_t>(n));
    }
    return done;
#else
    (void)from, (void)from_offset, (void)fd, (void)offset, (void)size;
    return 0;
#endif
}

}  // namespace

void write_at(int fd, const std::string& path, uint64_t offset, const uint8_t* data, uint64_t size) {
    while (size > 0) {
        const ssize_t n = ::pwrite(fd, data, static_cast<size_t>(size), static_cast<off_t>(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail_write(path, errno);
        data += n;
        offset += static_cast<uint64_t>(n);
        size -= static_cast<uint64_t>(n);
    }
}

void reserve(int fd, const std::string& path, uint64_t offset, uint64_t size) {
#ifdef __linux__
    // Not posix_fallocate: where the file system cannot, that writes zeros.
    while (::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(size)) != 0) {
        if (errno == ENOSPC || errno == EDQUOT) fail_write(path, errno);
        if (errno != EINTR) return;  // writing will do without, or fail with a reason
    }
#else
    (void)fd, (void)path, (void)offset, (void)size;
#endif
}

bool may_share(uint64_t from_offset, uint64_t offset, uint64_t size) {
    return size >= kPieceBytes && from_offset % kBlockBytes == offset % kBlockBytes;
}

Copier::Copier() : buffer_(kPieceBytes) {}

void Copier::copy_data(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path,
                       uint64_t offset, uint64_t size) {
    // Where blocks cannot be shared the kernel copies too, but with two pages to look up for each that it writes: half
    // as fast. Nor is it written from the map, of which each page would have to be mapped first.
    const bool by_kernel = may_share(from_offset, offset, size) || copies_elsewhere(fd);
    if (by_kernel) {
        const uint64_t done = copy_by_kernel(from, from_offset, fd, offset, size);
        from_offset += done;
        offset += done;
        size -= done;
    }
    copy_by_reading(from, from_offset, fd, path, offset, size, true);
}

void Copier::copy_by_reading(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path,
                             uint64_t offset, uint64_t size, bool zeros_too) {
    while (size > 0) {
        // Up to a boundary, so that no page is written in two pieces.
        const uint64_t n = std::min(size, kPieceBytes - offset % kPieceBytes);
        from.read(from_offset, buffer_.data(), n);
        if (zeros_too || !is_zero(buffer_.data(), n)) {
            write_at(fd, path, offset, buffer_.data(), n);
            start_flush(fd, offset, n);
        }
        from_offset += n;
        offset += n;
        size -= n;
    }
}

void Copier::copy_range(const gguf::Mapping& from, uint64_t from_offset, int fd, const std::string& path,
                        uint64_t offset, uint64_t size) {
    if (!from.is_sparse()) {
        copy_data(from, from_offset, fd, path, offset, size);
        return;
    }
    const uint64_t end = from_offset + size;
    for (uint64_t at = from_offset; at < end;) {
        const gguf::ByteRange data = next_data(from.fd(), at, end);
        // Read as well: file systems that compress were seen to call data a hole that had just been written. Of a true
        // hole nothing comes from the disk.
        copy_by_reading(from, at, fd, path, offset + (at - from_offset), data.offset - at, false);
        copy_data(from, data.offset, fd, path, offset + (data.offset - from_offset), data.size);
        at = data.end();
    }
}

void read_ahead(const gguf::Mapping& from, uint64_t offset, uint64_t size) {
#ifdef __linux__
    if (from.is_sparse()) return;  // memory would be filled with the zeros of its holes
    ::posix_fadvise(from.fd(), static_cast<off_t>(offset), static_cast<off_t>(size), POSIX_FADV_WILLNEED);
#else
    (void)from, (void)offset, (void)size;
#endif
}

}  // namespace moeshard::files
