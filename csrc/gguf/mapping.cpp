#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "moeshard/gguf.hpp"

namespace moeshard::gguf {

namespace {

int64_t modified(const struct stat& status) {
#ifdef __APPLE__
    const timespec& time = status.st_mtimespec;
#else
    const timespec& time = status.st_mtim;
#endif
    return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// Private, since some mounts have no shared maps; of what is only read it is the same. Null where there is none.
const uint8_t* map(int fd, uint64_t offset, uint64_t size) {
    void* data = ::mmap(nullptr, static_cast<size_t>(size), PROT_READ, MAP_PRIVATE, fd, static_cast<off_t>(offset));
    return data == MAP_FAILED ? nullptr : static_cast<const uint8_t*>(data);
}

void unmap(const uint8_t* data, uint64_t size) { ::munmap(const_cast<uint8_t*>(data), static_cast<size_t>(size)); }

uint64_t page_size() {
    static const auto size = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
    return size;
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
    }
    if (!problem.empty()) {
        ::close(fd_);
        throw Error(path + ": " + problem);
    }
    size_ = static_cast<uint64_t>(status.st_size);
    modified_ = modified(status);
    // Compressed files have fewer blocks as well; for these looking for holes only costs a little.
    is_sparse_ = static_cast<uint64_t>(status.st_blocks) * 512 < size_;
}

Mapping::~Mapping() {
    if (whole_ != nullptr) unmap(whole_, size_);
    ::close(fd_);
}

bool Mapping::is_shareable() const {
    void* data = ::mmap(nullptr, 1, PROT_READ, MAP_SHARED, fd_, 0);
    if (data == MAP_FAILED) return false;
    ::munmap(data, 1);
    return true;
}

const uint8_t* Mapping::whole() const {
    std::call_once(looked_at_, [&] { whole_ = map(fd_, 0, size_); });
    return whole_;
}

std::shared_ptr<const uint8_t> Mapping::view(uint64_t offset, uint64_t size) const {
    if (const uint8_t* data = whole()) return {shared_from_this(), data + offset};
    // There may be too little address space for all of a large file, and enough for what is wanted of it.
    const uint64_t before = offset % page_size();
    if (const uint8_t* data = map(fd_, offset - before, before + size)) {
        return {data + before, [data, length = before + size](const uint8_t*) { unmap(data, length); }};
    }
    const std::shared_ptr<uint8_t> copy(new uint8_t[static_cast<size_t>(size)], std::default_delete<uint8_t[]>());
    read(offset, copy.get(), size);
    return copy;
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

}  // namespace moeshard::gguf
