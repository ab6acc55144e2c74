// A file that appears under its name when it is complete.
#pragma once

#include <cstdint>
#include <string>

namespace moeshard::files {

// Made beside its place, under a hidden name; removed by the destructor unless it was published. What a killed process
// left behind under such a name is removed by the next one that writes the same file.
class TemporaryFile {
public:
    TemporaryFile(const std::string& path, uint64_t size);
    ~TemporaryFile();
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;

    int fd() const { return fd_; }
    const std::string& path() const { return path_; }

    void flush();  // to the disk
    // Gives it its name. Without `force` an existing file is an Error.
    void publish(bool force);

private:
    std::string path_;
    std::string temporary_;
    int fd_ = -1;
};

// The folder that `path` lies in.
std::string folder_of(const std::string& path);

}  // namespace moeshard::files
