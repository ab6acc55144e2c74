// A file that appears under its name when it is complete.
#pragma once

#include <cstdint>
#include <string>

#include "files/place.hpp"

namespace moeshard::files {

// Where the system can, the file has no name until it is published, so that nothing is left of it however the process
// ends. Elsewhere it has a hidden one beside its place, which the destructor removes; what a killed process left under
// such a name is removed by the next one that writes into the folder. Every error is an Error that names the path.
class PendingFile {
public:
    PendingFile(Place place, uint64_t size);
    ~PendingFile();
    PendingFile(const PendingFile&) = delete;
    PendingFile& operator=(const PendingFile&) = delete;

    int fd() const { return fd_; }
    const std::string& path() const { return place_.path; }
    const std::string& target() const { return place_.target; }

    void flush();  // to the disk
    // Gives it its name. Without `force` an existing file is an Error, and so is what is no file in any case.
    void publish(bool force);

private:
    bool link_to(const std::string& name) const;
    void open_hidden();

    Place place_;
    std::string hidden_;  // empty where it has no name, or the final one
    int fd_ = -1;
};

// A name in a folder is on the disk when the folder is.
void flush_folder(const std::string& folder);

}  // namespace moeshard::files
