#include <pybind11/stl.h>

#include "bindings/register.hpp"
#include "moeshard/worker.hpp"

namespace py = pybind11;

void register_worker(py::module_& m) {
    m.def(
        "serve_connection",
        [](int fd, const std::string& cache, int32_t n_threads, uint64_t memory) {
            const py::gil_scoped_release nogil;
            moeshard::serve_connection(fd, {cache, n_threads, memory});
        },
        py::arg("fd"), py::kw_only(), py::arg("cache") = "", py::arg("n_threads") = 0, py::arg("memory") = 0,
        "Compute layers for the client at the other end of a connected socket until it leaves.");
    m.def("rpc_version", &moeshard::rpc_version);
}
