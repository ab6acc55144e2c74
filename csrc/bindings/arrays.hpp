// How arrays cross the border between C++ and numpy.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "moeshard/error.hpp"
#include "moeshard/keep.hpp"

namespace py = pybind11;

using TokenArray = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using KeepArray = py::array_t<bool, py::array::c_style>;

// A numpy array that owns the vector: nothing is copied.
template <typename T>
py::array_t<T> take(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    T* data = owner->data();
    const py::capsule keep_alive(owner.get(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
    owner.release();
    return py::array_t<T>(std::move(shape), data, keep_alive);
}

inline std::vector<int32_t> to_tokens(const TokenArray& array) {
    if (array.ndim() != 1) throw moeshard::Error("tokens must be a one-dimensional array of integers");
    return {array.data(), array.data() + array.size()};
}

inline std::optional<moeshard::Keep> to_keep(const std::optional<KeepArray>& array) {
    if (!array) return std::nullopt;
    if (array->ndim() != 2) throw moeshard::Error("keep must be a boolean array of shape (n_layer, n_expert)");
    return moeshard::Keep(static_cast<int32_t>(array->shape(0)), static_cast<int32_t>(array->shape(1)),
                          reinterpret_cast<const uint8_t*>(array->data()));
}
