// Where a file may be written: one rule for all that moeshard writes.
#pragma once

#include <string>
#include <vector>

namespace moeshard::files {

// A file that is read, told from others by what it is and not by its name.
struct Input {
    std::string path;  // for messages
    int fd = -1;       // looked at in place of the path where it is open
};

// A name that a file can be given.
struct Place {
    std::string path;    // as it was given, for messages
    std::string target;  // the same without links: what is written is what a link points to
};

// Looks at what has the name, and tries whether its folder takes a file. Throws Error, naming `path`, where that is
// something other than a file (nothing that moeshard writes belongs in a device, a pipe or a socket), one of the inputs
// (through a link or under another name of it, too), a link to nothing, or a file and `force` is false.
Place find_place(const std::string& path, const std::vector<Input>& inputs, bool force);

// Throws Error where a file cannot have the name: find_place() without inputs, and without trying the folder.
void check_name(const Place& place, bool force);

// The folder that `path` lies in.
std::string folder_of(const std::string& path);

[[noreturn]] void fail_write(const std::string& path, int error);

}  // namespace moeshard::files
