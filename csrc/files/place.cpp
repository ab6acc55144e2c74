#include "files/place.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "files/pending_file.hpp"
#include "moeshard/error.hpp"

namespace moeshard::files {

namespace {

std::string resolve(const std::string& path, const std::string& shown) {
    const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr), &std::free);
    if (real == nullptr) fail_write(shown, errno);
    return real.get();
}

std::string link_target(const std::string& path) {
    std::string target(4096, '\0');
    const ssize_t n = ::readlink(path.c_str(), target.data(), target.size());
    target.resize(n < 0 ? 0 : static_cast<size_t>(n));
    return target;
}

const char* kind_of(mode_t mode) {
    if (S_ISDIR(mode)) return "a directory";
    if (S_ISFIFO(mode)) return "a pipe";
    if (S_ISSOCK(mode)) return "a socket";
    return "a device";
}

std::string name_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    return slash == path.npos ? path : path.substr(slash + 1);
}

// False where nothing has the name.
bool look(const std::string& path, struct stat& status) {
    if (::stat(path.c_str(), &status) == 0) return true;
    if (errno != ENOENT) fail_write(path, errno);
    struct stat link {};
    if (::lstat(path.c_str(), &link) == 0) {
        throw Error(path + ": is a link to '" + link_target(path) +
                    "', which does not exist; remove the link, or choose another name");
    }
    return false;
}

void check_found(const std::string& path, const struct stat& status, const std::vector<Input>& inputs, bool force) {
    if (!S_ISREG(status.st_mode)) {
        throw Error(path + ": is " + kind_of(status.st_mode) + ", not a file; choose another name");
    }
    for (const Input& input : inputs) {
        struct stat read {};
        const int found = input.fd >= 0 ? ::fstat(input.fd, &read) : ::stat(input.path.c_str(), &read);
        if (found != 0 || read.st_dev != status.st_dev || read.st_ino != status.st_ino) continue;
        const std::string as = input.path == path ? "" : " (as '" + input.path + "')";
        throw Error(path + ": is the file that is read" + as + "; write to another one");
    }
    if (!force) {
        throw Error(path + ": exists already; choose another name, or replace it with --force (force=True)");
    }
}

}  // namespace

std::string folder_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    if (slash == path.npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

void fail_write(const std::string& path, int error) {
    const char* hint = "";
    if (error == ENOSPC || error == EDQUOT) hint = "; free space on that disk or choose another one";
    if (error == ENAMETOOLONG) hint = "; choose a shorter one";
    throw Error(path + ": cannot write: " + std::strerror(error) + hint);
}

Place find_place(const std::string& path, const std::vector<Input>& inputs, bool force) {
    struct stat status {};
    Place place{path, ""};
    if (look(path, status)) {
        check_found(path, status, inputs, force);
        place.target = resolve(path, path);
    } else {
        const std::string name = name_of(path);
        if (name.empty()) throw Error(path + ": names a folder that does not exist, not a file; choose another name");
        const std::string folder = folder_of(path);
        struct stat around {};
        if (::stat(folder.c_str(), &around) != 0) {
            if (errno != ENOENT) fail_write(path, errno);
            throw Error(path + ": cannot write: No such file or directory: the folder '" + folder +
                        "' does not exist; make it, or choose another one");
        }
        const std::string real = resolve(folder, path);
        place.target = (real == "/" ? real : real + "/") + name;
    }
    const PendingFile tried(place, 0);
    return place;
}

void check_name(const Place& place, bool force) {
    struct stat status {};
    if (look(place.target, status)) check_found(place.path, status, {}, force);
}

}  // namespace moeshard::files
