// How text crosses the border between C++ and Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

namespace py = pybind11;

// Vocabularies may hold tokens that are pieces of characters; these survive as Python's own surrogate escapes.
inline py::str to_str(std::string_view text) {
    PyObject* str = PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "surrogateescape");
    if (str == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(str);
}

// File names need not be UTF-8 either.
inline py::str path_to_str(const std::string& path) {
    PyObject* str = PyUnicode_DecodeFSDefault(path.c_str());
    if (str == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(str);
}
