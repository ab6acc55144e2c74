#include "workspace.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "oracles.hpp"
#include "target.hpp"

namespace fuzz {

namespace {

// In memory where there is such a place.
std::string parent() {
    if (const char* folder = std::getenv("TMPDIR")) return folder;
    return ::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
}

void write(const std::string& path, const std::string& bytes, uint64_t size) {
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    require(fd >= 0 && ::write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()) &&
                (size <= bytes.size() || ::ftruncate(fd, static_cast<off_t>(size)) == 0),
            "there is room for temporary files");
    ::close(fd);
}

}  // namespace

Workspace::Workspace() : folder_(parent() + "/moeshard-fuzz-XXXXXX") {
    require(::mkdtemp(folder_.data()) != nullptr, "there is a place for temporary files");
    for (const char* name : {"/in.gguf", "/in-00001-of-00002.gguf", "/in-00002-of-00002.gguf"}) {
        names_.push_back(folder_ + name);
    }
}

Workspace::~Workspace() { remove(); }

moeshard::gguf::GGUFMap Workspace::open(const std::vector<std::string>& parts, uint64_t size) {
    const size_t first = parts.size() == 1 ? 0 : 1;
    for (size_t i = 0; i < parts.size(); ++i) write(names_[first + i], parts[i], i == 0 ? size : 0);
    struct Remover {
        const std::vector<std::string>& names;
        ~Remover() {
            for (const std::string& name : names) ::unlink(name.c_str());
        }
    } const remover{names_};
    return moeshard::gguf::GGUFMap(names_[first]);
}

void Workspace::remove() const {
    for (const std::string& name : names_) ::unlink(name.c_str());
    ::rmdir(folder_.c_str());
}

Workspace& workspace() {
    static Workspace instance;
    return instance;
}

void remove_files() { workspace().remove(); }

}  // namespace fuzz
