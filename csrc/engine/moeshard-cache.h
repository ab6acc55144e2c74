// The tensor cache of an RPC worker, as the patched call sites use it. Header only: the RPC backend is a library below
// us.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <string>

namespace moeshard::worker_cache {

// Writes `file` whole or not at all: a process that dies leaves nothing that looks like it.
inline void write(const std::filesystem::path& file, const void* data, size_t size) {
    std::filesystem::path part = file;
    part += "." + std::to_string(getpid()) + ".part";
    std::error_code failed;
    std::ofstream out(part, std::ios::binary);
    out.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
    out.close();
    if (out) std::filesystem::rename(part, file, failed);
    if (!out || failed) std::filesystem::remove(part, failed);
}

// What was read is `sound` or not: the file goes, or becomes the newest, so that the least used are known. Returns it.
inline bool check(const std::filesystem::path& file, bool sound) {
    std::error_code failed;
    if (sound) {
        std::filesystem::last_write_time(file, std::filesystem::file_time_type::clock::now(), failed);
    } else {
        std::filesystem::remove(file, failed);
    }
    return sound;
}

}  // namespace moeshard::worker_cache
