#include "files/temporary.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>

#include "moeshard/error.hpp"

namespace moeshard::files {

namespace {

constexpr char kEnding[] = ".part";
constexpr size_t kRandomLetters = 6;

std::string name_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    return slash == path.npos ? path : path.substr(slash + 1);
}

std::string random_name() {
    std::random_device random;
    std::string name;
    while (name.size() < kRandomLetters) name += static_cast<char>('a' + random() % 26);
    return name;
}

// Files of earlier processes, told from those in use by the lock that a living process holds.
void remove_stale(const std::string& folder, const std::string& prefix) {
    DIR* dir = ::opendir(folder.c_str());
    if (dir == nullptr) return;
    const std::string ending = kEnding;
    while (const dirent* entry = ::readdir(dir)) {
        const std::string name = entry->d_name;
        if (name.size() != prefix.size() + kRandomLetters + ending.size() ||
            name.compare(0, prefix.size(), prefix) != 0 ||
            name.compare(name.size() - ending.size(), ending.size(), ending) != 0) {
            continue;
        }
        const std::string path = folder + "/" + name;
        const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        if (fd < 0) continue;
        if (::flock(fd, LOCK_EX | LOCK_NB) == 0) ::unlink(path.c_str());
        ::close(fd);
    }
    ::closedir(dir);
}

}  // namespace

std::string folder_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    if (slash == path.npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

TemporaryFile::TemporaryFile(const std::string& path, uint64_t size) : path_(path) {
    const std::string folder = folder_of(path);
    const std::string prefix = "." + name_of(path) + ".";
    remove_stale(folder, prefix);
    // Not mkstemp: its files are their owner's alone, others are as the umask says.
    do {
        temporary_ = folder + "/" + prefix + random_name() + kEnding;
        fd_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (fd_ < 0 && errno == EEXIST);
    if (fd_ < 0) throw Error(path + ": cannot write: " + std::strerror(errno));
    // Not every file system has locks; without one only the removal of leftovers is lost.
    ::flock(fd_, LOCK_EX | LOCK_NB);
    if (::ftruncate(fd_, static_cast<off_t>(size)) != 0) {
        const int error = errno;
        ::unlink(temporary_.c_str());
        ::close(fd_);
        throw Error(path + ": cannot write " + std::to_string(size) + " bytes: " + std::strerror(error));
    }
}

TemporaryFile::~TemporaryFile() {
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    ::close(fd_);
}

void TemporaryFile::flush() {
    if (::fsync(fd_) != 0) throw Error(path_ + ": cannot write: " + std::strerror(errno));
}

void TemporaryFile::publish(bool force) {
    // A link is refused where the name exists, a rename replaces it. File systems without links get the latter.
    if (!force && ::link(temporary_.c_str(), path_.c_str()) == 0) {
        ::unlink(temporary_.c_str());
        temporary_.clear();
        return;
    }
    if (!force && errno == EEXIST) throw Error(path_ + ": appeared while it was being written; it was left alone");
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
        throw Error(path_ + ": cannot give the file its name: " + std::strerror(errno));
    }
    temporary_.clear();
}

}  // namespace moeshard::files
