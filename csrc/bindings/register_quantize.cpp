// Weights in the types of a GGUF.
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings/arrays.hpp"
#include "bindings/register.hpp"
#include "moeshard/quantize.hpp"

namespace {

using moeshard::Error;
using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

py::bytes quantized(const std::string& type, const FloatArray& values, const std::optional<FloatArray>& importance) {
    if (values.ndim() != 2) throw Error("weights to be quantised must be of shape (rows, n)");
    if (importance && importance->size() != values.shape(1)) throw Error("importance must be of shape (n,)");
    const uint32_t wanted = moeshard::gguf::quantizable_type(type);
    const auto rows = static_cast<uint64_t>(values.shape(0));
    const auto n = static_cast<uint64_t>(values.shape(1));
    std::string bytes;
    {
        const py::gil_scoped_release nogil;
        bytes = moeshard::gguf::quantize(wanted, values.data(), rows, n, importance ? importance->data() : nullptr);
    }
    return bytes;
}

py::array_t<float> dequantized(const std::string& type, const ByteArray& bytes, uint64_t n) {
    const uint32_t own = moeshard::gguf::quantizable_type(type);
    std::vector<float> values;
    {
        const py::gil_scoped_release nogil;
        values = moeshard::gguf::dequantize(own, bytes.data(), static_cast<uint64_t>(bytes.size()), n);
    }
    return take(std::move(values), {static_cast<py::ssize_t>(n)});
}

}  // namespace

void register_quantize(py::module_& m) {
    m.def(
        "quantize", &quantized, py::arg("type"), py::arg("values"), py::arg("importance") = py::none(),
        "Return float32 (rows, n) as bytes of a type, by ggml; importance (n,) says how much an error of each counts.");
    m.def("dequantize", &dequantized, py::arg("type"), py::arg("bytes"), py::arg("n"),
          "Return float32 (n,) of bytes of a type.");
}
