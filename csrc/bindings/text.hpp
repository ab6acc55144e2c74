// How text crosses the border between C++ and Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

#include "moeshard/error.hpp"

namespace py = pybind11;

// Text that is given to the core. Python's own may hold what has no UTF-8 (bytes of a command line, halves of a pair of
// UTF-16): that is an Error, and not an argument of another type.
struct Text {
    std::string utf8;
};

template <>
struct pybind11::detail::type_caster<Text> {
    PYBIND11_TYPE_CASTER(Text, const_name("str | bytes"));

    bool load(handle source, bool) {
        if (PyBytes_Check(source.ptr())) {
            value.utf8 = reinterpret_borrow<bytes>(source);
            return true;
        }
        if (!PyUnicode_Check(source.ptr())) return false;
        Py_ssize_t size = 0;
        const char* data = PyUnicode_AsUTF8AndSize(source.ptr(), &size);
        if (data == nullptr) {
            PyErr_Clear();
            throw moeshard::Error("the text holds what is no character: a byte that is no UTF-8, or half of a pair");
        }
        value.utf8.assign(data, static_cast<size_t>(size));
        return true;
    }
};

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
