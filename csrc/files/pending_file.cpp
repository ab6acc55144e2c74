#include "files/pending_file.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <string_view>
#include <utility>

#include "moeshard/error.hpp"

namespace moeshard::files {

namespace {

// Not made from the file's own name, to which nothing could be added where it is as long as names may be.
constexpr std::string_view kBeginning = ".moeshard-";
constexpr std::string_view kEnding = ".part";
constexpr size_t kLetters = 8;

std::string letters(uint64_t number) {
    std::string text;
    for (; text.size() < kLetters; number /= 26) text += static_cast<char>('a' + number % 26);
    return text;
}

// Of this machine: another one that shares the folder may not see who holds a lock.
std::string machine_letters() {
    char name[256] = {};
    ::gethostname(name, sizeof(name) - 1);
    uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
    for (const char* at = name; *at != '\0'; ++at) hash = (hash ^ static_cast<uint8_t>(*at)) * 0x100000001b3;
    return letters(hash);
}

std::string prefix() { return std::string(kBeginning) + machine_letters() + "-"; }

std::string hidden_name(const std::string& folder) {
    std::random_device random;
    return folder + "/" + prefix() + letters(random() | static_cast<uint64_t>(random()) << 32) + std::string(kEnding);
}

bool is_hidden_name(std::string_view name, std::string_view prefix) {
    return name.size() == prefix.size() + kLetters + kEnding.size() && name.substr(0, prefix.size()) == prefix &&
           name.substr(name.size() - kEnding.size()) == kEnding;
}

// Files of earlier processes, told from those in use by the lock that a living process holds.
void remove_stale(const std::string& folder) {
    DIR* dir = ::opendir(folder.c_str());
    if (dir == nullptr) return;
    const std::string own = prefix();
    while (const dirent* entry = ::readdir(dir)) {
        if (!is_hidden_name(entry->d_name, own)) continue;
        const std::string path = folder + "/" + entry->d_name;
        // For writing: over a network a lock of this kind is given for nothing else.
        const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        if (fd < 0) continue;
        if (::flock(fd, LOCK_EX | LOCK_NB) == 0) ::unlink(path.c_str());
        ::close(fd);
    }
    ::closedir(dir);
}

std::string name_of_open(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

// -1 where the system cannot, or could not give it a name later.
int open_nameless(const std::string& folder) {
#ifdef O_TMPFILE
    const int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0666);
    if (fd >= 0 && ::access(name_of_open(fd).c_str(), F_OK) == 0) return fd;
    if (fd >= 0) ::close(fd);
#else
    (void)folder;
#endif
    return -1;
}

}  // namespace

PendingFile::PendingFile(Place place, uint64_t size) : place_(std::move(place)) {
    const std::string folder = folder_of(target());
    remove_stale(folder);
    fd_ = open_nameless(folder);
    if (fd_ < 0) {
        open_hidden();
    } else {
        ::flock(fd_, LOCK_EX | LOCK_NB);  // for the moment in which it has a hidden name: see publish()
    }
    if (::ftruncate(fd_, static_cast<off_t>(size)) != 0) {
        const int error = errno;
        if (!hidden_.empty()) ::unlink(hidden_.c_str());
        ::close(fd_);
        throw Error(path() + ": cannot write " + std::to_string(size) + " bytes: " + std::strerror(error));
    }
}

PendingFile::~PendingFile() {
    if (!hidden_.empty()) ::unlink(hidden_.c_str());
    ::close(fd_);
}

void PendingFile::open_hidden() {
    for (;;) {
        hidden_ = hidden_name(folder_of(target()));
        // Not mkstemp: its files are their owner's alone, others are as the umask says.
        fd_ = ::open(hidden_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd_ < 0 && errno == EEXIST) continue;
        if (fd_ < 0) fail_write(path(), errno);
        // Not every file system has locks; without one only the removal of leftovers is lost.
        ::flock(fd_, LOCK_EX);
        // Before it had its lock another process may have taken it for a leftover.
        struct stat status {};
        if (::fstat(fd_, &status) != 0 || status.st_nlink > 0) return;
        ::close(fd_);
    }
}

void PendingFile::flush() {
    if (::fsync(fd_) != 0) fail_write(path(), errno);
}

bool PendingFile::link_to(const std::string& name) const {
    if (!hidden_.empty()) return ::link(hidden_.c_str(), name.c_str()) == 0;
    return ::linkat(AT_FDCWD, name_of_open(fd_).c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0;
}

void PendingFile::publish(bool force) {
    // What has the name may be another thing than when the work began.
    if (force) check_name(place_, true);
    // A link is refused where the name exists, a rename replaces it. File systems without links get the latter.
    if (link_to(target())) {
        if (!hidden_.empty()) ::unlink(hidden_.c_str());
        hidden_.clear();
        return;
    }
    struct stat status {};
    if (!force && (errno == EEXIST || ::lstat(target().c_str(), &status) == 0)) {
        throw Error(path() + ": appeared while it was being written; it was left alone");
    }
    if (hidden_.empty()) {
        std::string name = hidden_name(folder_of(target()));
        if (!link_to(name)) fail_write(path(), errno);
        hidden_ = std::move(name);
    }
    if (::rename(hidden_.c_str(), target().c_str()) != 0) {
        throw Error(path() + ": cannot give the file its name: " + std::strerror(errno));
    }
    hidden_.clear();
}

void flush_folder(const std::string& folder) {
    const int fd = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    ::fsync(fd);
    ::close(fd);
}

}  // namespace moeshard::files
