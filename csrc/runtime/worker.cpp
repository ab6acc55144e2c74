#include "moeshard/worker.hpp"

#include "engine/limited_device.hpp"
#include "files/threads.hpp"
#include "ggml-rpc.h"
#include "runtime/guard.hpp"

namespace moeshard {

void serve_connection(int fd, const WorkerParams& params) {
    const Guard guard;  // the engine is set up with the first one
    const int n_threads = files::threads_wanted(params.n_threads, "n_threads");
    hook::LimitedBackends backends(params.memory, n_threads);
    guard.run("the connection ended", [&] {
        ggml_backend_rpc_serve_connection(fd, params.cache.empty() ? nullptr : params.cache.c_str(),
                                          backends.all().size(), backends.all().data());
    });
}

std::string rpc_version() {
    return std::to_string(RPC_PROTO_MAJOR_VERSION) + "." + std::to_string(RPC_PROTO_MINOR_VERSION) + "." +
           std::to_string(RPC_PROTO_PATCH_VERSION);
}

}  // namespace moeshard
