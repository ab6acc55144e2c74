// Read-only mappings of Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

// Python's protocol for a read-only mapping, from its keys and a lookup that returns nullptr for what is not there.
template <typename Class, typename Keys, typename Find, typename Convert>
void bind_mapping(py::module_& m, const char* name, Keys keys, Find find, Convert convert) {
    const auto get = [find, convert](const Class& self, const std::string& key, py::object fallback) {
        const auto* found = find(self, key);
        return found == nullptr ? fallback : py::object(convert(self, *found));
    };
    const auto cls =
        py::class_<Class>(m, name)
            .def("__len__", [keys](const Class& self) { return py::len(keys(self)); })
            .def("__iter__", [keys](const Class& self) { return py::iter(keys(self)); })
            .def("__contains__",
                 [find](const Class& self, const std::string& key) { return find(self, key) != nullptr; })
            .def("__contains__", [](const Class&, const py::object&) { return false; })
            .def("__getitem__",
                 [find, convert](const Class& self, const std::string& key) {
                     const auto* found = find(self, key);
                     if (found == nullptr) throw py::key_error(key);
                     return convert(self, *found);
                 })
            .def("get", get, py::arg("key"), py::arg("default") = py::none())
            .def("keys", keys)
            .def("values",
                 [keys, find, convert](const Class& self) {
                     py::list values;
                     for (const py::handle key : keys(self))
                         values.append(convert(self, *find(self, py::cast<std::string>(key))));
                     return values;
                 })
            .def("items", [keys, find, convert](const Class& self) {
                py::list items;
                for (const py::handle key : keys(self)) {
                    items.append(py::make_tuple(key, convert(self, *find(self, py::cast<std::string>(key)))));
                }
                return items;
            });
    py::module_::import("collections.abc").attr("Mapping").attr("register")(cls);
}
