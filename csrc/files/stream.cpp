#include "files/stream.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>

namespace moeshard {

namespace {

struct Cursor {
    const SegmentList* segments;
    uint64_t at = 0;

    int64_t read(char* out, uint64_t size) {
        const uint64_t n = at < segments->size() ? std::min(size, segments->size() - at) : 0;
        try {
            segments->read(at, reinterpret_cast<uint8_t*>(out), n);
        } catch (...) {  // this is called from C
            errno = EIO;
            return -1;
        }
        at += n;
        return static_cast<int64_t>(n);
    }

    int64_t seek(int64_t offset, int whence) {
        const uint64_t from = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? at : segments->size();
        const int64_t target = static_cast<int64_t>(from) + offset;
        if (target < 0) {
            errno = EINVAL;
            return -1;
        }
        at = static_cast<uint64_t>(target);
        return target;
    }
};

}  // namespace

std::unique_ptr<std::FILE, CloseFile> open_stream(const SegmentList& segments) {
    auto cursor = std::make_unique<Cursor>(Cursor{&segments});
#ifdef __APPLE__
    std::FILE* file = ::funopen(
        cursor.get(),
        [](void* c, char* out, int size) {
            return static_cast<int>(static_cast<Cursor*>(c)->read(out, static_cast<uint64_t>(size)));
        },
        nullptr,
        [](void* c, fpos_t offset, int whence) -> fpos_t { return static_cast<Cursor*>(c)->seek(offset, whence); },
        [](void* c) {
            delete static_cast<Cursor*>(c);
            return 0;
        });
#else
    cookie_io_functions_t functions{};
    functions.read = [](void* c, char* out, size_t size) -> ssize_t {
        return static_cast<Cursor*>(c)->read(out, size);
    };
    functions.seek = [](void* c, off64_t* offset, int whence) {
        const int64_t target = static_cast<Cursor*>(c)->seek(*offset, whence);
        if (target < 0) return -1;
        *offset = target;
        return 0;
    };
    functions.close = [](void* c) {
        delete static_cast<Cursor*>(c);
        return 0;
    };
    std::FILE* file = ::fopencookie(cursor.get(), "rb", functions);
#endif
    if (file == nullptr) throw Error(std::string("cannot make a stream: ") + std::strerror(errno));
    cursor.release();
    // Tensors are read whole, past any buffer; what is left are the many small reads of the header.
    std::setvbuf(file, nullptr, _IOFBF, 1 << 16);
    return std::unique_ptr<std::FILE, CloseFile>(file);
}

}  // namespace moeshard
