// Layers computed for models of other machines, through llama.cpp's RPC backend.
#pragma once

#include <cstdint>
#include <string>

namespace moeshard {

struct WorkerParams {
    std::string cache;      // a folder for tensors that were sent, so that they need not be again; "": none
    int32_t n_threads = 0;  // 0: as many as the processors this process may use
    uint64_t memory = 0;    // bytes that clients are told there are; 0: what there is
};

// Computes for the client at the other end of `fd`, a connected TCP socket, until it leaves; then `fd` is closed. The
// protocol knows no authentication: whoever can write to the socket can do what this process can. Throws Error.
void serve_connection(int fd, const WorkerParams& params);

// Versions of that protocol differ where this differs, e.g. "7.0.0".
std::string rpc_version();

}  // namespace moeshard
